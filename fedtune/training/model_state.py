"""Reading and writing the shared state: what a federation trains, in fp32, and the masks it agrees on."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["get_model_state", "get_tensor_shapes", "named_tensors", "precise", "set_model_state"]


def get_model_state(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of the named tensors, in fp32 but for integers."""
    tensors = named_tensors(model)
    return {name: _copy(tensors[name].detach()) for name in names}


def precise(tensor: Tensor) -> Tensor:
    """A tensor in the precision of the shared state, fp32 but for integers; no copy where it is that already."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _copy(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor.clone()


@torch.no_grad()
def set_model_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Write the state into the model, rounding to its precision."""
    tensors = named_tensors(model)
    for name, tensor in state.items():
        tensors[name].copy_(tensor)


def get_tensor_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that may be shared."""
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
