"""Gradients of inputs from given gradients of outputs, without what torch imports for them.

``torch.autograd.grad`` with gradients of outputs imports sympy: 37 MB and half a second per process. With a scalar,
whose gradient is one, it does not.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["compute_input_gradients"]


def compute_input_gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], gradients: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of ``inputs`` from those of ``outputs``; None for an input that no output depends on."""
    with torch.enable_grad():
        scalar = _Begin.apply(gradients, *outputs)
    found: tuple[Tensor | None, ...] = torch.autograd.grad(scalar, inputs, allow_unused=True)
    return found


class _Begin(torch.autograd.Function):
    """A scalar whose backward pass begins with the given gradients."""

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.empty(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        del ctx.gradients
        return None, *gradients
