"""A small net with batch norms to do without, and a step through it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.models.efficientnet_lite import SameConv2d
from fedtune.techniques.pruning._pruned_input_layers import InputStorage, RecentInputs
from fedtune.techniques.pruning._pruned_tensor import PruningRule
from fedtune.techniques.pruning._standardised_conv2d import (
    ConvNormPair,
    find_conv_norm_pairs,
    standardise_convolutions,
)

__all__ = ["PADDED", "STRIDED", "Net", "a_mask", "drawn", "gradients", "keeping", "made_normal"]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def a_mask(*shape: int, density: float = 0.5) -> Tensor:
    drawn_at = torch.rand(*shape, generator=torch.Generator().manual_seed(1))
    return (drawn_at < density).byte()


PADDED = partial(nn.Conv2d, padding=1)


STRIDED = partial(SameConv2d, stride=2)


class Net(nn.Sequential):
    """A stem, a convolution behind a ReLU and a pooling, and one that a sum parts from the next norm."""

    def __init__(self, kind: Callable[..., nn.Conv2d] = PADDED) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(2)
        self.deep, self.deep_norm = kind(8, 8, 3), nn.BatchNorm2d(8)
        self.alone, self.late_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.pool(self.relu(self.norm(self.stem(pixel_values))))
        x = self.deep_norm(self.deep(x))
        out: Tensor = self.late_norm(x + self.alone(x))
        return out


def keeping(prune: float = 0.0) -> InputStorage:
    return InputStorage(PruningRule(prune), False, RecentInputs())


def made_normal(model: nn.Module, prune: float = 0.0) -> list[ConvNormPair]:
    pairs = find_conv_norm_pairs(model)
    standardise_convolutions(model, pairs, keeping(prune))
    return pairs


def gradients(model: nn.Module, x: Tensor) -> dict[str, Any]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    out.backward(drawn(*out.shape, seed=9, dtype=out.dtype))
    return {name: p.grad for name, p in model.named_parameters()} | {"input": x.grad, "out": out.detach()}
