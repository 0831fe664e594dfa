"""Give the linear layers of a model without weights the storage that bitsandbytes' NF4 layers have."""

from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from torch import nn

__all__ = ["quantise_skeleton"]

_BLOCK, _NESTED_BLOCK = 64, 256
"""The number of weights per scale, and of scales per scale of scales."""


class _FourBitSkeleton(Linear4bit):  # type: ignore[misc]
    """An NF4 layer without data. Its state has no entry for the scales, whose form depends on data."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)


def quantise_skeleton(model: nn.Module, kept: Sequence[str]) -> None:
    """Replace the plain linear layers, except those under the names in ``kept``."""
    for name, layer in list(model.named_modules()):
        whole = any(name == one or name.startswith(f"{one}.") for one in kept)
        if type(layer) is nn.Linear and not whole:
            model.set_submodule(name, _make_four_bit_layer(layer))
    vars(model)["is_loaded_in_4bit"] = vars(model)["is_quantized"] = True


def _make_four_bit_layer(layer: nn.Linear) -> Linear4bit:
    """Return an NF4 layer without data. Its weight is a plain parameter, since a Params4bit quantises real numbers."""
    made: Any = _FourBitSkeleton.__new__(_FourBitSkeleton)
    nn.Module.__init__(made)
    made.in_features, made.out_features, made.bias = layer.in_features, layer.out_features, layer.bias
    made.compute_dtype, made.compute_type_is_set = torch.float32, True
    made.quant_state, made.quant_storage, made.support_avx512bf16_for_cpu = None, torch.uint8, False
    packed = torch.empty(-(-layer.weight.numel() // 2), 1, dtype=torch.uint8)
    made.weight = nn.Parameter(packed, requires_grad=False)
    made.weight.quant_state = _make_quant_state(layer.weight)
    made.weight.compress_statistics, made.weight.quant_type = True, "nf4"
    four_bit: Linear4bit = made
    return four_bit


def _make_quant_state(weight: torch.Tensor) -> QuantState:
    scales = -(-weight.numel() // _BLOCK)
    nested = QuantState(
        absmax=torch.empty(-(-scales // _NESTED_BLOCK)),
        blocksize=_NESTED_BLOCK,
        code=torch.empty(256),
        dtype=torch.float32,
    )
    return QuantState(
        absmax=torch.empty(scales, dtype=torch.uint8),
        shape=weight.shape,
        code=torch.empty(16),
        blocksize=_BLOCK,
        quant_type="nf4",
        dtype=weight.dtype,
        offset=torch.empty(()),
        state2=nested,
    )
