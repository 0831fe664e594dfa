"""Reads and writes the shared state: the trained tensors in fp32, and weight masks."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fedtune.techniques import rebuild_weights

__all__ = ["get_model_state", "get_tensor_shapes", "named_tensors", "precise", "set_model_state"]


def get_model_state(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return copies of the named tensors on the CPU. Floats become fp32; integers keep their type."""
    tensors = named_tensors(model)
    return {name: _copy(tensors[name].detach()) for name in names}


def precise(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU in the precision of the shared state: fp32, or unchanged for integers.

    It copies only if needed.
    """
    return tensor.to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", torch.float32, copy=True) if tensor.is_floating_point() else tensor.to("cpu", copy=True)


@torch.no_grad()
def set_model_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Write the state into the model, rounded to the model's precision. Weights that follow from it are rebuilt."""
    tensors = named_tensors(model)
    for name, tensor in state.items():
        tensors[name].copy_(tensor)
    rebuild_weights(model, list(state))


def get_tensor_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters and buffers, by name."""
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
