"""MagMax: keep, at each entry, the change with the largest magnitude, and add a share of it to the base.

What: scale * x_k with k = argmax_i |x_i|, entry by entry. If magnitudes are equal, the later model wins. The weights of
the models are not used.
Memory: two chunks, for any number of models: the winner so far is all that is kept. A stream of tasks therefore needs
one stored task vector and not one per task.
Use when: models were fine-tuned one after the other on the tasks of a stream, so that their changes mostly agree.
Avoid when: models were trained independently and from few examples, because noise has large entries too. Measure
``mean`` beside it.
Adapters: this step is refused when clients send one LoRA factor (alternating LoRA, or A frozen). It selects entries of
the factor by size, but one product can be written with different factors, so equal updates would give different
results.
Source: Marczak et al., "MagMax: Leveraging Model Merging for Seamless Continual Learning" (arXiv 2407.06322), their
theta_0 + lambda tau_MagMax, and the authors' code: ``>=`` for ties, and lambda 0.5. Ours: running statistics of batch
norms are averaged.
"""

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.merging._step import CombineStep, MergeInput, Shape
from fedtune.merging.combine._weights import Scale
from fedtune.wire.client_update import iter_row_chunks

__all__ = ["Magmax", "keep_larger"]


class Magmax(CombineStep):
    """Selects the largest change of each entry."""

    name: ClassVar[str] = "magmax"
    sparsifies: ClassVar[bool] = True
    selects_entries: ClassVar[bool] = True
    scale: Scale = 0.5

    def compute_client_weights(self, num_examples: Sequence[int]) -> list[float]:
        """Equal weights."""
        return [1 / len(num_examples)] * len(num_examples)

    def combine(self, name: str, shape: Shape, merge_inputs: Sequence[MergeInput]) -> Iterator[Tensor]:
        """The scaled winners of each chunk."""
        for start, stop in iter_row_chunks(shape):
            rows = (merge_input.read_rows(name, start, stop) for merge_input in merge_inputs)
            yield (reduce(keep_larger, rows).float() * self.scale).reshape(stop - start, *shape[1:])


def keep_larger(earlier: Tensor, later: Tensor) -> Tensor:
    """The entry with the larger magnitude; the later one if both are equal."""
    return torch.where(later.abs() >= earlier.abs(), later, earlier)
