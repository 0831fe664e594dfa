"""Reading and writing the shared state: the named parameters and statistics a federation trains, in fp32."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["load_state", "read_state"]


def read_state(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of the named tensors in fp32."""
    tensors = _tensors(model)
    return {name: tensors[name].detach().to(torch.float32, copy=True) for name in names}


@torch.no_grad()
def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Write the state into the model, rounding to its precision."""
    tensors = _tensors(model)
    for name, tensor in state.items():
        tensors[name].copy_(tensor)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
