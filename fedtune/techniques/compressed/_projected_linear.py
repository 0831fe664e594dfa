"""Linear layers whose weight moves in a random subspace: y = x Wᵀ + (x P) Uᵀ + b, with W and P fixed and U trained.

The gradient of U is gᵀ (x P), so x P is kept instead of x. The gradient of x is that of the weight W + U Pᵀ.
"""

import weakref
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtune.seeds import derive_seed

__all__ = ["UPDATE", "ProjectedInputs", "draw_projection", "install_projection", "merge_projection", "set_projection"]

UPDATE = "projected_update"
"""The name of U in a layer."""
_PROJECTION = "projection"


def draw_projection(seed: int, round_number: int, width: int, rank: int) -> Tensor:
    """Return P [width, rank] of a round, with entries from N(0, 1 / rank): the expectation of P Pᵀ is one.

    It is drawn on the CPU in single precision, so that each process and device gets the same numbers.
    """
    random = torch.Generator().manual_seed(derive_seed(seed, round_number, width, rank, "projection"))
    return torch.randn(width, rank, generator=random).div_(rank**0.5)


class _Known(NamedTuple):
    """A projection, the input it was made of, and what else it depends on."""

    x: weakref.ref[Tensor]
    state: tuple[int, int, bool]
    projected: Tensor


class ProjectedInputs:
    """The last projection, while its input lives: layers with the same input, such as query, key and value, share it.

    They always do, whatever keeps activations, so that gradients are summed in the same order.
    """

    def __init__(self) -> None:
        self._known: _Known | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ProjectedInputs, ()

    def clear(self) -> None:
        """Forget it. A new step has a new graph."""
        self._known = None

    def project(self, x: Tensor, projection: Tensor) -> Tensor:
        """Return x P."""
        state = (x._version, id(projection), torch.is_grad_enabled())
        if self._known is None or self._known.x() is not x or self._known.state != state:
            self._known = _Known(weakref.ref(x, self._forget), state, x @ projection)
        return self._known.projected

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        if self._known is not None and self._known.x is gone:
            self._known = None


def install_projection(layer: nn.Linear, rank: int, inputs: ProjectedInputs) -> None:
    """Freeze a layer's weight and train its update U [outputs, rank], which begins at zero."""
    layer.weight.requires_grad_(False)
    layer.register_parameter(UPDATE, nn.Parameter(layer.weight.new_zeros(layer.out_features, rank)))
    vars(layer)["forward"] = partial(_run, layer, inputs)


def set_projection(layer: nn.Linear, projection: Tensor) -> None:
    """Set P. Layers of one width share it; it is no part of the layer's state."""
    layer.register_buffer(_PROJECTION, projection, persistent=False)


def merge_projection(layer: nn.Linear) -> None:
    """Add U Pᵀ to the weight and restore the plain layer."""
    with torch.no_grad():
        layer.weight += (layer.get_parameter(UPDATE) @ layer.get_buffer(_PROJECTION).T).to(layer.weight.dtype)
    layer._parameters.pop(UPDATE)
    layer._buffers.pop(_PROJECTION)
    layer._non_persistent_buffers_set.discard(_PROJECTION)
    del vars(layer)["forward"]


def _run(layer: nn.Linear, inputs: ProjectedInputs, x: Tensor) -> Tensor:
    """[..., inputs] -> [..., outputs]."""
    plain = F.linear(x, layer.weight, layer.bias)
    return plain + F.linear(inputs.project(x, layer.get_buffer(_PROJECTION)), layer.get_parameter(UPDATE))
