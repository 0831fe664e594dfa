"""Arithmetic on the parameters that a client trains, by name."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedtune.wire.client_update import ClientUpdate, iter_row_chunks

__all__ = ["add_to_gradient", "copy_parameters", "move_to_parameters", "sum_deltas"]

Parameters = Mapping[str, nn.Parameter]


def copy_parameters(parameters: Parameters) -> dict[str, Tensor]:
    """Return copies of the present values."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def move_to_parameters(tensors: Mapping[str, Tensor], parameters: Parameters) -> dict[str, Tensor]:
    """Return a tensor for each parameter, on its device and in its type; zeros where there is none."""
    return {
        name: tensors[name].to(parameter.device, parameter.dtype) if name in tensors else torch.zeros_like(parameter)
        for name, parameter in parameters.items()
    }


@torch.no_grad()
def add_to_gradient(parameter: nn.Parameter, term: Tensor) -> None:
    """Add a term to the gradient. A parameter that had none moves by the term alone."""
    if parameter.grad is None:
        parameter.grad = term.detach().clone()
    else:
        parameter.grad.add_(term)


def sum_deltas(updates: Sequence[ClientUpdate], name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the sum of a tensor's deltas over the updates, in double precision and in their order."""
    total = torch.zeros(shape, dtype=torch.float64)
    rows = total if total.dim() else total.unsqueeze(0)
    for start, stop in iter_row_chunks(shape):
        for update in updates:
            rows[start:stop] += update.read_rows(name, start, stop).double().reshape(rows[start:stop].shape)
    return total
