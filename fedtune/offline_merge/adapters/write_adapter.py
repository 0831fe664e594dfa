"""Write a PEFT adapter whose modules may have different ranks. PEFT reads the same products from it."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.files import write_bytes_atomically
from fedtune.merging._low_rank_factors import LowRankFactors
from fedtune.offline_merge.adapters.adapter_tokenizers import copy_tokenizer
from fedtune.offline_merge.adapters.lora_adapter import CONFIG, TENSORS, FactorNames, LoraAdapterReader
from fedtune.offline_merge.safetensors_layout import fits, too_large

__all__ = ["build_adapter_config", "cast", "write_adapter"]

_ALL_TARGETS: dict[str, Any] = {
    "exclude_modules": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "init_lora_weights": True,
    "use_rslora": False,
    "inference_mode": True,
}
"""Every module is named in full, and scales are alpha / r."""


def write_adapter(
    out: Path,
    adapters: Sequence[LoraAdapterReader],
    places: Mapping[str, FactorNames],
    factors: Mapping[str, LowRankFactors],
    whole: Mapping[str, Tensor],
    tokens: Path | None,
) -> None:
    """Write the folder. The configuration comes last, because a folder without it is no adapter.

    ``tokens`` is the folder of the tokenizer, if there is one. Factors are rounded once. Raises ModelError, before
    anything is written, for factors that are too large for the data type.
    """
    dtype, tensors = adapters[0].dtype, dict(whole)
    for module, made in factors.items():
        place = places[module]
        like = next(one.tensor_shapes for one in adapters if module in one.modules)
        tensors[place.a] = cast(place.a, made.a.reshape(-1, *like[place.a][1:]), dtype)
        tensors[place.b] = cast(place.b, made.b.reshape(*made.b.shape, *like[place.b][2:]), dtype)
    payload = safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()}, metadata={"format": "pt"})
    write_bytes_atomically(out / TENSORS, payload)
    if tokens is not None:
        copy_tokenizer(tokens, out)
    write_bytes_atomically(
        out / CONFIG, (json.dumps(build_adapter_config(adapters, factors), indent=2) + "\n").encode()
    )


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in the data type; ModelError if it is too large for it."""
    if not fits(tensor, dtype):
        raise ModelError(too_large(name, tensor, dtype, "take smaller weights"))
    return tensor.to(dtype)


def build_adapter_config(
    adapters: Sequence[LoraAdapterReader], factors: Mapping[str, LowRankFactors]
) -> dict[str, Any]:
    """Return the first adapter's settings with the modules, ranks and alphas of the result. The scale is alpha / r."""
    ranks = {module: made.rank for module, made in factors.items()}
    alphas = {module: made.scale * made.rank for module, made in factors.items()}
    rank, alpha = (Counter(found.values()).most_common(1)[0][0] for found in (ranks, alphas))
    heads = {name for one in adapters for name in one.read_setting("modules_to_save") or ()}
    return {
        **adapters[0].config,
        **_ALL_TARGETS,
        "target_modules": sorted(factors),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _patterns(ranks, rank),
        "alpha_pattern": _patterns(alphas, alpha),
        "modules_to_save": sorted(heads) or None,
        "bias": next((bias for one in adapters if (bias := one.read_setting("bias")) != "none"), "none"),
    }


def _patterns(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """Return the values that differ from the usual one, by patterns that match only one module."""
    return {f"^{module}": value for module, value in sorted(values.items()) if value != usual}
