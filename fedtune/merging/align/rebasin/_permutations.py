"""Permutations of a model's units that do not change its function, and their effect on its tensors.

A specification names the permutation that each axis of each tensor follows, or none. Tables 2 of Ainsworth et
al. (arXiv 2209.04836) and the symmetries of attention by Verma & Elbayad (arXiv 2403.00986).
"""

from collections.abc import Iterator, Mapping, Set
from typing import NamedTuple

import torch
from torch import Tensor

from fedtune.errors import ModelError

__all__ = [
    "AxisLocation",
    "HeadLayout",
    "Permutation",
    "PermutationKind",
    "PermutationSpec",
    "Permutations",
    "PermutedAxis",
    "Shape",
    "UnitLayout",
]

Shape = tuple[int, ...]
Permutation = Mapping[str, Tensor]
"""Per part of a permutation, which unit comes to each place: part' = part[order]."""
Permutations = Mapping[str, Permutation]


class UnitLayout(NamedTuple):
    """Units that may change places; under a group norm only within their group, and groups with one another."""

    size: int
    groups: int = 1

    @property
    def parts(self) -> dict[str, int]:
        """Sizes of the parts."""
        return {"": self.size}


class HeadLayout(NamedTuple):
    """The heads of one attention layer: ``groups`` keys and values, each read by ``per_group`` queries.

    Groups may change places, and so may the queries of a group. Within a head the ``v`` channels of values and output
    may, and the ``qk`` channels of queries and keys unless they are ``rotary``; both alike for all queries of a group.
    """

    num_kv_heads: int
    queries_per_kv_head: int
    qk: int
    v: int
    is_rotary: bool

    @property
    def parts(self) -> dict[str, int]:
        """Sizes of the parts: rows of queries, keys and values, and what the output projection reads."""
        keys, queries = self.num_kv_heads, self.num_kv_heads * self.queries_per_kv_head
        return {"q": queries * self.qk, "k": keys * self.qk, "v": keys * self.v, "o": queries * self.v}

    def build_permutation(self, groups: Tensor, queries: Tensor, qk: Tensor, v: Tensor) -> Permutation:
        """From the old group at each place [g], its old queries [g, p] and its old channels [g, qk] and [g, v]."""
        heads = groups[:, None] * self.queries_per_kv_head + queries
        return {
            "q": (heads[:, :, None] * self.qk + qk[:, None]).flatten(),
            "k": (groups[:, None] * self.qk + qk).flatten(),
            "v": (groups[:, None] * self.v + v).flatten(),
            "o": (heads[:, :, None] * self.v + v[:, None]).flatten(),
        }


PermutationKind = UnitLayout | HeadLayout


class PermutedAxis(NamedTuple):
    """What one axis lists: parts of a permutation, one after the other, with ``block`` entries to every unit."""

    permutation: str
    parts: tuple[str, ...] = ("",)
    block: int = 1

    def compute_indices(self, order: Permutation, kind: PermutationKind) -> Tensor:
        """The index of the entry that moves to each place."""
        sizes, start, found = kind.parts, 0, []
        for part in self.parts:
            found.append(order[part] + start)
            start += sizes[part]
        units = torch.cat(found)
        return (units[:, None] * self.block + torch.arange(self.block)).flatten()

    def count_entries(self, kind: PermutationKind) -> int:
        """The number of entries of the axis."""
        return self.block * sum(kind.parts[part] for part in self.parts)

    def split_into_rows(self, tensor: Tensor, at: int, kind: PermutationKind) -> Iterator[tuple[str, Tensor]]:
        """Each part's units as rows [n, the rest of the tensor], in double precision; ``at`` is the axis' place."""
        moved = tensor.double().movedim(at, 0)
        sizes = [self.block * kind.parts[part] for part in self.parts]
        for part, entries in zip(self.parts, moved.split(sizes), strict=True):
            yield part, entries.reshape(kind.parts[part], -1)


class AxisLocation(NamedTuple):
    """An axis of a tensor that a permutation acts on."""

    tensor: str
    at: int
    axis: PermutedAxis


class PermutationSpec(NamedTuple):
    """For every tensor of a state the permutation of each axis, and for every permutation its kind."""

    axes: Mapping[str, tuple[PermutedAxis | None, ...]]
    kinds: Mapping[str, PermutationKind]

    def build_identity(self) -> Permutations:
        """The permutations that move nothing."""
        return {
            name: {part: torch.arange(size) for part, size in kind.parts.items()} for name, kind in self.kinds.items()
        }

    def list_permuted_tensors(self) -> list[str]:
        """Tensors that some permutation acts on."""
        return [name for name, axes in self.axes.items() if any(axes)]

    def list_locations(self, permutation: str) -> list[AxisLocation]:
        """All axes that a permutation acts on."""
        return [
            AxisLocation(name, at, axis)
            for name, axes in self.axes.items()
            for at, axis in enumerate(axes)
            if axis and axis.permutation == permutation
        ]

    def permute(self, name: str, tensor: Tensor, orders: Permutations, but: int | None = None) -> Tensor:
        """A tensor after the permutation of all its axes, or of all but one."""
        for at, axis in enumerate(self.axes[name]):
            if axis and at != but:
                index = axis.compute_indices(orders[axis.permutation], self.kinds[axis.permutation])
                tensor = tensor.index_select(at, index)
        return tensor

    def restrict_to(self, names: Set[str]) -> "PermutationSpec":
        """The specification of these tensors alone."""
        return self._replace(axes={name: axes for name, axes in self.axes.items() if name in names})

    def check_shapes(self, shapes: Mapping[str, Shape]) -> None:
        """Raises ModelError unless all tensors are covered, with their shapes, and none has one permutation twice."""
        for name, shape in shapes.items():
            if name not in self.axes:
                raise ModelError(f"rebasin: nothing is known of {name!r}, which the model lacks; leave rebasin out")
            self._check_one(name, shape)

    def _check_one(self, name: str, shape: Shape) -> None:
        axes = self.axes[name]
        lengths = [axis.count_entries(self.kinds[axis.permutation]) if axis else None for axis in axes]
        if len(axes) != len(shape) or any(n not in (None, m) for n, m in zip(lengths, shape, strict=False)):
            wanted = [n or "any" for n in lengths]
            raise ModelError(f"rebasin: {name!r} has shape {list(shape)} in place of {wanted}; align like models only")
        permutations = [axis.permutation for axis in axes if axis]
        if len(permutations) != len(set(permutations)):
            raise ModelError(
                f"rebasin: {name!r} maps units onto themselves, which cannot be matched; leave rebasin out"
            )
