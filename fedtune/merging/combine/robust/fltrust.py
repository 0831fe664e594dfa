"""FLTrust: weigh each update by how well it agrees with one that the server trained on examples of its own.

What: the server trains an update g_0 on its root data, as a client does. The trust of a client is TS_i =
max(0, cos(g_i, g_0)), and the result is sum_i TS_i (|g_0| / |g_i|) g_i / sum_i TS_i. Cosines are those of whole
models. If no client is trusted, the round fails and the state stays as it is.
Defaults: root_data none, which is refused; root_examples 100, drawn once with the run's seed.
Memory: two passes, one chunk of each model, and one delta of the server. Inner products: n^2 / 2.
Use when: any number of clients may be hostile, and the server has about a hundred clean examples like those of clients.
Avoid when: the root data lacks what clients have: their updates then seem to disagree. The length of each step is that
of the server's own update, so few root examples with ``local_epochs`` make short steps; ``local_steps`` does not.
With ``root_data: validation``, the validation scores are of examples that had a part in training. Test examples have
none. The server needs the memory and the time of one client.
Adapters: if clients send one factor of a product, cosines are those of the factors.
Source: Cao, Fang, Liu, Gong, "FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping" (arXiv 2012.13995),
whose global learning rate is 1 here.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedtune.errors import ClientUpdateError, RecipeError
from fedtune.merging._step import BoundCombine, MergeContext, MergeInput, Reference, Shape
from fedtune.merging.combine.linear_combinations.linear import Linear
from fedtune.merging.combine.robust._reference import make_reference_input
from fedtune.merging.combine.robust._robust_step import RobustStep, compute_finite_gram

__all__ = ["FlTrust", "compute_trusted_coefficients"]


class FlTrust(RobustStep):
    """The mean of updates by trust, each as long as the server's own."""

    name: ClassVar[str] = "fltrust"
    reference: ClassVar[Reference | None] = "root data"
    root_data: str | None = Field(
        None, description="the server's examples: validation, or a source of their own such as csv:FILE"
    )
    root_examples: int = Field(100, ge=1, description="number of root examples; all if there are fewer")

    def bind(
        self, shapes: Mapping[str, Shape], merge_inputs: Sequence[MergeInput], context: MergeContext
    ) -> BoundCombine:
        """A sum with the coefficients of trust."""
        if not context.reference:
            raise RecipeError(
                "merge: fltrust compares models with an update that a server trains in a round, and here is none; "
                "choose geometric-median"
            )
        gram = compute_finite_gram(self.name, shapes, [*merge_inputs, make_reference_input(context.reference, shapes)])
        c = compute_trusted_coefficients(gram)
        if not bool(c.any()) and bool(gram.diagonal()[:-1].any()):
            raise ClientUpdateError(
                "merge: fltrust trusts no update, since none agrees with that of the root data; check the root data"
            )
        weighted = [one._replace(weight=weight) for one, weight in zip(merge_inputs, c.tolist(), strict=True)]
        return BoundCombine(Linear(normalise=False), weighted)

    def combine(self, name: str, shape: Shape, merge_inputs: Sequence[MergeInput]) -> Iterator[Tensor]:
        """The sum with the coefficients that ``bind`` has computed."""
        return Linear(normalise=False).combine(name, shape, merge_inputs)


def compute_trusted_coefficients(gram: Tensor) -> Tensor:
    """The coefficients [n] of the models from their inner products [n + 1, n + 1], the server's update last."""
    lengths = gram.diagonal().clamp_min(0).sqrt()
    safe = torch.where(lengths > 0, lengths, 1.0)
    trust = (gram[:-1, -1] / (safe[:-1] * safe[-1])).clamp_min(0)
    total = trust.sum()
    return trust * lengths[-1] / safe[:-1] / total if total > 0 else torch.zeros_like(trust)
