"""Linear combinations of deltas: sum_i c_i x_i, with c from the weights and the inner products <x_i, x_j>.

One pass computes the inner products, a second one the sum; both hold one chunk per model. Formulas work on coefficients
alone, so that iterations cost nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from fedtune.merging._step import CombineStep, MergeInput, Shape
from fedtune.merging.combine._inner_products import Granularity, compute_gram, flatten_rows
from fedtune.merging.combine._weighted_sums import sum_weighted
from fedtune.merging.combine._weights import stack_weights
from fedtune.wire.client_update import iter_row_chunks

__all__ = ["GramCombineStep"]


class GramCombineStep(CombineStep, ABC):
    """sum_i c_i x_i of each tensor."""

    @property
    def coefficient_scope(self) -> Granularity:
        """What has coefficients of its own; a tensor of fewer than two dimensions always is one group."""
        return "tensor"

    @abstractmethod
    def compute_coefficients(self, weights: Tensor, gram: Callable[[], Tensor]) -> Tensor:
        """c [K, groups] from weights [K, 1] and ``gram()`` [K, K, groups], which reads all deltas once; double."""

    def combine(self, name: str, shape: Shape, merge_inputs: Sequence[MergeInput]) -> Iterator[Tensor]:
        """The sum of each piece."""
        over = self.coefficient_scope if len(shape) > 1 else "tensor"
        c = self.compute_coefficients(
            stack_weights(merge_inputs), lambda: compute_gram(name, shape, merge_inputs, over)
        )
        for start, stop in iter_row_chunks(shape):
            total = _sum_rows(name, start, stop, merge_inputs, _select_coefficients(c, over, start, stop))
            yield total.float().reshape(stop - start, *shape[1:])


def _select_coefficients(c: Tensor, over: Granularity, start: int, stop: int) -> list[float] | list[Tensor]:
    """The models' coefficients for some rows: numbers, or what broadcasts to the rows."""
    if over == "tensor":
        numbers: list[float] = c[:, 0].tolist()
        return numbers
    return list(c[:, start:stop, None] if over == "row" else c[:, None, :])


def _sum_rows(
    name: str, start: int, stop: int, merge_inputs: Sequence[MergeInput], share: Sequence[float | Tensor]
) -> Tensor:
    """sum_i share_i x_i of some rows; a model that counts nothing is not read."""
    counted = [pair for pair in zip(merge_inputs, share, strict=True) if _is_nonzero(pair[1])] or [
        (merge_inputs[0], share[0])
    ]
    rows = (flatten_rows(merge_input.read_rows(name, start, stop)) for merge_input, _ in counted)
    return sum_weighted(rows, [c for _, c in counted])


def _is_nonzero(share: float | Tensor) -> bool:
    return bool(share.any()) if isinstance(share, Tensor) else share != 0
