"""Checks of a model whose matrices are in a file, before it is trained."""

from collections.abc import Sequence

from torch import nn

from fedtune.errors import ModelError
from fedtune.models.paging.disk_speed import warn_of_slow_disk
from fedtune.models.paging.paged_layers import list_paged_layers

__all__ = ["check_paging"]


def check_paging(model: nn.Module, shared: Sequence[str]) -> None:
    """Raise ModelError if a matrix in the file would be trained or sent, and warn if its disk is slow."""
    layers = dict(list_paged_layers(model))
    changed = [f"{name}.weight" for name in layers if f"{name}.weight" in shared]
    if changed:
        raise ModelError(
            f"model.paged: {changed[0]} would change, but it is in a file that is only read; take lora with "
            "trained_factors: alternate, b-only or both, or drop model.paged"
        )
    warn_of_slow_disk(list({layer.matrix.name: layer.matrix for layer in layers.values()}.values()))
