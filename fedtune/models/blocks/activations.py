"""Activation functions by transformers' names, with its arithmetic."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["ACTIVATIONS"]


class NewGelu(nn.Module):
    """GELU by its tanh approximation, operation by operation."""

    def forward(self, x: Tensor) -> Tensor:
        """[...] -> [...]."""
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class QuickGelu(nn.Module):
    """GELU by a sigmoid."""

    def forward(self, x: Tensor) -> Tensor:
        """[...] -> [...]."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_new": NewGelu,
    "gelu_pytorch_tanh": lambda: nn.GELU("tanh"),
    "quick_gelu": QuickGelu,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
}
