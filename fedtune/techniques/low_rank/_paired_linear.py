"""A frozen linear layer with low-rank pairs beside it: the names, the drawing and the bits of PEFT's layer.

It takes the place of PEFT's layer in models of plain blocks, so that a device does not import PEFT.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedtune.loaded_classes import is_loaded_instance
from fedtune.techniques.low_rank._pair_product import add_pair_product

__all__ = ["PairSettings", "PairedLinear", "add_plain_pairs", "is_pair_layer"]


class PairSettings(NamedTuple):
    """The rank of pairs, the factor of their products times the rank, and the dropout before them."""

    rank: int
    alpha: float
    dropout: float


class PairedLinear(nn.Module):
    """y = W x + sum over pairs of (alpha / rank) B A x."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.scaling: dict[str, float] = {}
        self.lora_dropout: Any = {}  # no modules where there is no dropout: hundreds of them take megabytes
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()

    def add_pair(self, name: str, settings: PairSettings) -> None:
        """Add a pair: A drawn from the global generator, B zero, both in the type of W."""
        self.scaling[name] = settings.alpha / settings.rank
        if settings.dropout > 0:
            self.lora_dropout = self.lora_dropout or nn.ModuleDict()
            self.lora_dropout[name] = nn.Dropout(settings.dropout)
        else:
            self.lora_dropout[name] = _return_same
        right = nn.Linear(self.in_features, settings.rank, bias=False)
        left = nn.Linear(settings.rank, self.out_features, bias=False)
        nn.init.kaiming_uniform_(right.weight, a=math.sqrt(5))
        nn.init.zeros_(left.weight)
        weight = self.base_layer.weight
        self.lora_A[name], self.lora_B[name] = (
            right.to(weight.device, weight.dtype),
            left.to(weight.device, weight.dtype),
        )

    def get_base_layer(self) -> nn.Linear:
        """Return the frozen layer."""
        return self.base_layer

    def get_delta_weight(self, name: str) -> Tensor:
        """Return (alpha / rank) B A, computed in single precision on a processor."""
        left, right = self.lora_B.get_parameter(f"{name}.weight"), self.lora_A.get_parameter(f"{name}.weight")
        is_coarse = left.device.type == "cpu" and left.dtype in (torch.float16, torch.bfloat16)
        if not is_coarse:
            return (left @ right) * self.scaling[name]
        return ((left.float() @ right.float()) * self.scaling[name]).to(left.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        result: Tensor = self.base_layer(x)
        dtype = result.dtype
        for name, right in self.lora_A.items():
            x = x.to(right.get_parameter("weight").dtype)
            result = add_pair_product(self, name, x, result)
        return result.to(dtype)


def _return_same(x: Tensor) -> Tensor:
    return x


def add_plain_pairs(model: nn.Module, targets: Sequence[str], names: Sequence[str], settings: PairSettings) -> None:
    """Add pairs of these names beside linear layers."""
    for target in targets:
        layer: Any = model.get_submodule(target)
        model.set_submodule(target, PairedLinear(layer).train(layer.training))
    for name in names:
        for target in targets:
            paired: Any = model.get_submodule(target)
            paired.add_pair(name, settings)


def is_pair_layer(layer: nn.Module) -> bool:
    """Whether a layer has low-rank pairs beside it."""
    return isinstance(layer, PairedLinear) or is_loaded_instance(layer, "peft.tuners.lora", "LoraLayer")
