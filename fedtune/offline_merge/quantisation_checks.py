"""Detect folders whose tensors are quantised codes, not the model's weights."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fedtune.errors import SourceError
from fedtune.offline_merge.json_file import read_json
from fedtune.offline_merge.safetensors_layout import TensorInfo

__all__ = ["check_plain"]

_CONFIGS = ("quantization_config", "compression_config")
_BESIDE = (
    "_scale",
    "_scale_inv",
    "_scale_2",
    "_zero_point",
    "_packed",
    ".SCB",
    ".qweight",
    ".qzeros",
    ".scales",
    "_blocks",
    "_scales",
)
"""Names of tensors that are stored beside a quantised weight or instead of it."""
_SMALL = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)
_MASK = 4
"""The number of dimensions of a causal mask, which older models store as bytes."""


def check_plain(folder: Path, origin: str, forms: Mapping[str, TensorInfo]) -> None:
    """Raise SourceError if config.json or the tensors show a quantisation."""
    methods = [
        str(found.get("quant_method", "a method it does not name")) for found in _list_quantisations(_settings(folder))
    ]
    if methods:
        raise SourceError(f"{origin} is quantised by {methods[0]}, which fedtune cannot undo; take the plain release")
    small = [name for name, form in forms.items() if form.dtype in _SMALL and 2 <= len(form.shape) < _MASK]
    beside = [name for name in forms if name.endswith(_BESIDE)]
    codes = [name for name in small if not forms[name].dtype.is_floating_point]
    if codes or (small and beside):
        raise SourceError(
            f"{origin} seems quantised (it holds {(beside or codes)[0]}), but config.json does not say how; take the "
            "plain release"
        )


def _settings(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json")


def _list_quantisations(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Return every quantisation in the settings and in their parts."""
    for key, value in settings.items():
        if key in _CONFIGS and value:
            yield value if isinstance(value, dict) else {}
        elif isinstance(value, dict):
            yield from _list_quantisations(value)
