"""QLoRA: LoRA on a frozen base whose weights are stored in four-bit NormalFloat.

What: the base's linear layers are stored as NF4 blocks with doubly quantised scales, and are dequantised while they are
used. The low-rank pair and a classifier's new head are trained in full precision.
Saves: about three quarters of the weights' memory, in addition to what LoRA saves. Activations stay as they are.
Sends: what LoRA sends. The base is never sent. Search the learning rate as for LoRA.
Use when: the weights themselves do not fit the device.
Avoid when: they fit. Dequantisation costs time on a processor, and the base has a rounding error.
Source: Dettmers et al., "QLoRA" (arXiv 2305.14314), equations 5 and 6; kernels by bitsandbytes.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from pydantic import model_validator
from transformers import BitsAndBytesConfig

from fedtune.techniques.low_rank._low_rank import LowRankTechnique

__all__ = ["Qlora"]


class Qlora(LowRankTechnique):
    """A low-rank pair beside NF4 layers."""

    name: ClassVar[str] = "qlora"
    fits_zeroth_order: ClassVar[bool] = True
    paged_base_problem: ClassVar[str | None] = "quantises the base in memory; model.paged: nf4 does so in the file"
    has_exact_gradients: ClassVar[bool] = False
    allows_kv_cache: ClassVar[bool] = True
    conflicts_with: ClassVar[Mapping[str, str]] = {
        "head-only": "the head is already trained with the low-rank pairs",
        "full": "full trains the weights that qlora freezes",
        "lora": "both add a low-rank pair to the same layers",
    }
    unsupported_devices: ClassVar[Mapping[str, str]] = {"mps": "which bitsandbytes has no kernels for"}

    @model_validator(mode="after")
    def _base_is_not_writable(self) -> Self:
        if self.trained_factors == "both-and-base":
            raise ValueError(
                "trained_factors: both-and-base changes the base weights, but four-bit weights are fixed; use lora"
            )
        return self

    def make_quantisation_config(self) -> Any:
        """NF4 with double quantisation; computes in single precision."""
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
