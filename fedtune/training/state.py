"""Reading and writing the shared state: the named parameters a federation trains, in single precision."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["load_state", "read_state"]


def read_state(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of the named parameters in fp32."""
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach().to(torch.float32, copy=True) for name in names}


@torch.no_grad()
def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Write the state into the model's parameters, rounding to their precision."""
    parameters = dict(model.named_parameters())
    for name, tensor in state.items():
        parameters[name].copy_(tensor)
