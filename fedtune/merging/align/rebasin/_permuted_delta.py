"""Deltas of a permuted model: aligned = pi(base + delta) - base."""

from collections.abc import Mapping, Set

from safetensors import SafetensorError
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.merging._step import MergeInput
from fedtune.merging.align.rebasin._permutations import Permutations, PermutationSpec
from fedtune.merging.align.rebasin._weight_matching import TensorReader

__all__ = ["PermutedDelta", "make_tensor_reader"]


class PermutedDelta:
    """The rows of a permuted model's delta. The last tensor is cached, so that its chunks cost one read."""

    def __init__(
        self, symmetry: PermutationSpec, orders: Permutations, base: Mapping[str, Tensor], merge_input: MergeInput
    ) -> None:
        self._symmetry, self._orders, self._base, self._operand = symmetry, orders, base, merge_input
        self._moved = frozenset(symmetry.list_permuted_tensors())
        self._model = make_tensor_reader(base, merge_input, self._moved)
        self._held: tuple[str, Tensor] | None = None

    def __call__(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``, fp32."""
        if name not in self._moved:
            return self._operand.read_rows(name, start, stop)
        if self._held is None or self._held[0] != name:
            self._held = None
            permuted = self._symmetry.permute(name, self._model(name), self._orders)
            self._held = name, permuted - self._base[name]
        return self._held[1][start:stop]


def make_tensor_reader(base: Mapping[str, Tensor], merge_input: MergeInput, moved: Set[str]) -> TensorReader:
    """Reads a model's tensors, fp32: base plus delta; the base alone for tensors that were not sent and do not move."""

    def read(name: str) -> Tensor:
        before = base[name]
        if not before.is_floating_point():
            return before
        try:
            delta = merge_input.read_rows(name, 0, len(before) if before.dim() else 1)
        except (KeyError, SafetensorError) as error:
            if name in moved:
                raise ModelError(
                    f"rebasin: no {name!r} was sent, which moves with others; train whole models or leave rebasin out"
                ) from error
            return before.float()
        return before.float() + delta.reshape(before.shape)

    return read
