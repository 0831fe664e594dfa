"""Groups of tensors in one flat mapping, by a prefix of their names."""

from collections.abc import Mapping

from torch import Tensor

__all__ = ["join_groups", "select_group"]


def join_groups(**groups: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of all groups; names begin with the group."""
    return {f"{group}/{name}": one for group, tensors in groups.items() for name, one in tensors.items()}


def select_group(tensors: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    """Return one group of ``join_groups``, by the names of before."""
    prefix = f"{group}/"
    return {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
