"""Lets PEFT's plain layers add their pairs by ``add_pair_product``."""

from typing import Any

from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor

from fedtune.techniques.low_rank._pair_product import add_pair_product

__all__ = ["sum_in_fewer_passes"]


def sum_in_fewer_passes(layer: LoraLayer) -> None:
    """Let a plain layer of PEFT compute its sum this way; other layers stay as they are."""
    if type(layer) is Linear and not layer.lora_variant:
        layer.lora_variant = dict.fromkeys(layer.lora_A, _PairSum())


class _PairSum(LoraVariant):  # type: ignore[misc]
    """PEFT's hook for another way to compute W x + scale B A x."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """``result`` is W x, in the precision of the base."""
        return add_pair_product(module, active_adapter, x, result)
