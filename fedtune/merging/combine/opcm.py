"""OPCM: add task vectors one by one, each without what it changes along the directions of those before it.

What: for the weight of a linear layer, S_1 = x_1 and S_t = S_(t-1) + U (P without its diagonal and its first k rows and
columns) V^T, with the singular vectors U, V of S_(t-1) and P = U^T x_t V. Of the singular values, the first k + 1 have
more than the fraction ``alpha`` of the sum. All other tensors are added. The sum of the whole model is then scaled, so
that its norm is the mean of the norms of the models. The weights of the models are not used.
Memory: one tensor of two models in double precision, with its singular value decomposition. Each decomposition is
computed twice, once for the norm.
Use when: models arrive one after the other, their tasks interfere, and the model should stay as far from the base as
one fine-tune is.
Avoid when: the order of the models means nothing, because the result depends on it, or matrices are large: each needs a
singular value decomposition per model.
Adapters: this step is refused when clients send one LoRA factor (alternating LoRA, or A frozen). The directions of a
factor are not those of the product.
Source: Tang et al., "Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model
Merging" (arXiv 2501.09522), as in the authors' code (fusion_bench), alpha 0.5. Their lambda_t cancels out of the
recursion, so that one scale at the end gives the same model. Ours: models keep the given order (theirs: shuffled). A
linear layer is recognised by its two axes and by a name without ``embed``, ``wte.`` or ``wpe.``. Directions without a
singular value are not removed (theirs removes a diagonal in an arbitrary basis of them). Running statistics of batch
norms are averaged and count in no norm.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedtune.errors import ClientUpdateError
from fedtune.merging._step import BoundCombine, CombineStep, MergeContext, MergeInput, RowReader, Shape
from fedtune.merging.combine._inner_products import add_rows_in_order, compute_row_dots
from fedtune.merging.combine._subspace_cleaning import add_cleaned
from fedtune.wire.client_update import iter_row_chunks

__all__ = ["Opcm"]

_EMBEDDINGS = ("embed", "wte.", "wpe.")
_RUNNING = (".running_mean", ".running_var")


class Opcm(CombineStep):
    """Adds cleaned task vectors at the mean norm."""

    name: ClassVar[str] = "opcm"
    sparsifies: ClassVar[bool] = True
    selects_entries: ClassVar[bool] = True
    alpha: float = Field(0.5, ge=0, lt=1, description="fraction of the singular values that later models leave alone")

    def compute_client_weights(self, num_examples: Sequence[int]) -> list[float]:
        """Equal weights."""
        return [1 / len(num_examples)] * len(num_examples)

    def bind(
        self, shapes: Mapping[str, Shape], merge_inputs: Sequence[MergeInput], context: MergeContext
    ) -> BoundCombine:
        """The step, with deltas that are scaled so that their cleaned sum has the mean norm of the models."""
        norms, merged = [0.0] * len(merge_inputs), 0.0
        for name in (name for name in shapes if not name.endswith(_RUNNING)):
            deltas = [_read_matrix(name, shapes[name], merge_input) for merge_input in merge_inputs]
            norms = [total + _sum_squares(delta) for total, delta in zip(norms, deltas, strict=True)]
            _check_finite(name, norms)
            merged += _sum_squares(self._merge(name, shapes[name], deltas))
        mean = sum(map(math.sqrt, norms)) / len(norms)
        factor = mean / math.sqrt(merged) if merged else 1.0
        scaled = [one._replace(read_rows=_scale_reader(one.read_rows, factor)) for one in merge_inputs]
        return BoundCombine(self, scaled)

    def combine(self, name: str, shape: Shape, merge_inputs: Sequence[MergeInput]) -> Iterator[Tensor]:
        """The cleaned sum of the whole tensor, in chunks."""
        total = self._merge(name, shape, (_read_matrix(name, shape, merge_input) for merge_input in merge_inputs))
        for start, stop in iter_row_chunks(shape):
            yield total[start:stop].float().reshape(stop - start, *shape[1:])

    def _merge(self, name: str, shape: Shape, deltas: Iterator[Tensor] | Sequence[Tensor]) -> Tensor:
        if not _is_linear(name, shape):
            return torch.stack([delta.double() for delta in deltas]).sum(0)
        return add_cleaned(deltas, self.alpha)


def _check_finite(name: str, norms: Sequence[float]) -> None:
    for number, norm in enumerate(norms):
        if not math.isfinite(norm):
            raise ClientUpdateError(f"merge: opcm: {name} of model {number + 1} is not finite; leave this model out")


def _is_linear(name: str, shape: Shape) -> bool:
    return len(shape) == 2 and min(shape) > 0 and not any(word in name for word in _EMBEDDINGS)


def _read_matrix(name: str, shape: Shape, merge_input: MergeInput) -> Tensor:
    """A whole delta as [rows, width]."""
    height, *width = shape or (1,)
    return merge_input.read_rows(name, 0, height).reshape(height, math.prod(width))


def _sum_squares(matrix: Tensor) -> float:
    rows = matrix.double()
    return float(add_rows_in_order(torch.zeros(1, dtype=torch.float64), compute_row_dots(rows, rows)[:, None]))


def _scale_reader(read_rows: RowReader, factor: float) -> RowReader:
    def read_scaled(name: str, start: int, stop: int) -> Tensor:
        rows = read_rows(name, start, stop)
        return rows if name.endswith(_RUNNING) else rows * factor

    return read_scaled
