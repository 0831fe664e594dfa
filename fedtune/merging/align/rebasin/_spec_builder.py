"""Collects the permutations of channels and the axes of tensors while a network is traced."""

from typing import NamedTuple

from torch import nn

from fedtune.errors import ModelError
from fedtune.merging.align.rebasin._permutations import PermutationKind, PermutationSpec, PermutedAxis, UnitLayout

__all__ = ["PermutationSpecBuilder", "TracedChannels", "make_unsupported_error"]

_FIXED = ""


class TracedChannels(NamedTuple):
    """Channels that follow a permutation, or none (the net's input); ``spatial`` ones stand before height and width."""

    permutation: str = _FIXED
    channels: int = 0
    is_spatial: bool = False


def make_unsupported_error(where: str, why: str) -> ModelError:
    """The error for a layer or function that is not known."""
    return ModelError(f"rebasin: {where} {why}; leave rebasin out")


class PermutationSpecBuilder:
    """The axes of tensors and the joined permutations that have been found so far."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.axes: dict[str, tuple[PermutedAxis | None, ...]] = {}
        self._units: dict[str, UnitLayout] = {}
        self._same: dict[str, str] = {}

    def is_fixed(self, wire: TracedChannels) -> bool:
        """Whether nothing may be permuted, because the net's input or output would be."""
        return self._root(wire.permutation) == _FIXED

    def add_permutation(self, where: str, channels: int, *, spatial: bool) -> TracedChannels:
        """Add a permutation for the output channels of a layer."""
        self._units.setdefault(where, UnitLayout(channels))
        return TracedChannels(where, channels, spatial)

    def join_permutations(self, one: TracedChannels, other: TracedChannels, where: str) -> TracedChannels:
        """Join the permutations of two tensors that are added or multiplied; a fixed one wins."""
        kept, dropped = self._root(one.permutation), self._root(other.permutation)
        if _FIXED not in (kept, dropped) and (one.channels, one.is_spatial) != (other.channels, other.is_spatial):
            raise make_unsupported_error(where, "joins channels of different layout")
        if dropped == _FIXED:
            kept, dropped = dropped, kept
        if kept != dropped:
            self._same[dropped] = kept
            self.require_groups(TracedChannels(kept), self._units[dropped].groups, where)
        return one if one.channels else other

    def require_groups(self, wire: TracedChannels, groups: int, where: str) -> None:
        """Keep ``groups`` of channels together."""
        root = self._root(wire.permutation)
        kind = self._units.get(root)
        if kind and 1 not in (kind.groups, groups) and kind.groups != groups:
            raise make_unsupported_error(where, "groups channels that are grouped otherwise before")
        if kind:
            self._units[root] = kind._replace(groups=max(kind.groups, groups))

    def make_axis(self, wire: TracedChannels, length: int, where: str) -> PermutedAxis | None:
        """How an axis of ``length`` entries lists a wire's channels: in blocks, where maps were flattened."""
        if self.is_fixed(wire):
            return None
        if length % wire.channels:
            raise make_unsupported_error(where, f"takes {length} inputs where {wire.channels} channels arrive")
        return PermutedAxis(wire.permutation, block=length // wire.channels)

    def set_tensor_axes(self, where: str, layer: nn.Module, *axes: PermutedAxis | None) -> None:
        """Give a layer's tensors these axes: a bias the first alone, kernels none beyond."""
        for name, tensor in layer.state_dict().items():
            whole = (*axes, None, None, None) if tensor.dim() > 1 else axes[:1]
            self.axes[f"{where}.{name}"] = tuple(whole[: tensor.dim()])

    def build_spec(self) -> PermutationSpec:
        """The specification; each permutation has the name of the layer that it began at."""
        axes = {name: tuple(self._resolved(axis) for axis in of) for name, of in self.axes.items()}
        kinds: dict[str, PermutationKind] = {
            name: kind for name, kind in self._units.items() if self._root(name) == name
        }
        return PermutationSpec(axes, kinds)

    def _root(self, permutation: str) -> str:
        while permutation in self._same:
            permutation = self._same[permutation]
        return permutation

    def _resolved(self, axis: PermutedAxis | None) -> PermutedAxis | None:
        root = self._root(axis.permutation) if axis else _FIXED
        return axis._replace(permutation=root) if axis and root != _FIXED else None
