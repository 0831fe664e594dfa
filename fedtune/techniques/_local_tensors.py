"""Tensors that are trained and stay on each device: local batch norms, and what an algorithm keeps."""

from collections.abc import Iterable

from torch import nn

from fedtune.techniques._layers.unfrozen_batch_norm import list_local_tensors as list_local_norms

__all__ = ["keep_tensors", "list_kept_tensors", "list_local_tensors"]

_KEPT = "kept_on_device"


def keep_tensors(model: nn.Module, names: Iterable[str]) -> None:
    """Note in the model that these tensors stay on each device."""
    vars(model)[_KEPT] = tuple(names)


def list_kept_tensors(model: nn.Module) -> list[str]:
    """Return the names given to ``keep_tensors``."""
    return list(vars(model).get(_KEPT, ()))


def list_local_tensors(model: nn.Module) -> list[str]:
    """Return the names of all tensors that each device keeps for itself: trained, but neither sent nor merged."""
    return [*list_local_norms(model), *list_kept_tensors(model)]
