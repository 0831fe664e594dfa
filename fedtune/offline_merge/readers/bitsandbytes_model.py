"""Read checkpoints that bitsandbytes quantised to four bits, dequantised a few rows at a time.

One byte contains two values, the first in its upper half. Each block of values has a scale. The scales may themselves
be quantised to eight bits with a scale and a common offset (QLoRA, arXiv 2305.14314, section 3: double quantisation).
"""

import json
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedtune.errors import SourceError
from fedtune.offline_merge.readers.model_reader import ModelReader
from fedtune.offline_merge.readers.safetensors_folder import SafetensorsModelReader
from fedtune.offline_merge.safetensors_layout import TensorInfo

__all__ = ["FourBitModelReader", "is_four_bit_checkpoint"]

_MARK = ".quant_state.bitsandbytes__"
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


def is_four_bit_checkpoint(folder: SafetensorsModelReader) -> bool:
    """Whether some tensor is quantised to four bits."""
    return any(_MARK in name for name in folder.tensor_infos)


class _Nested(NamedTuple):
    """How the scales are dequantised: values by code [256], one scale per block, one offset."""

    values: Tensor
    scales: Tensor
    block: int
    offset: float


class _Code(NamedTuple):
    """How one tensor is dequantised: values by code [16], one scale per block."""

    form: TensorInfo
    values: Tensor
    block: int
    nested: _Nested | None


class FourBitModelReader(ModelReader):
    """The dequantised tensors of a folder."""

    is_quantised = True

    def __init__(self, folder: SafetensorsModelReader) -> None:
        self._stored = folder
        self.source, self.folder, self.files = folder.source, folder.folder, folder.files
        states = {name.partition(_MARK)[0]: name for name in folder.tensor_infos if _MARK in name}
        self._codes = {name: self._code(name, state) for name, state in states.items()}
        inner = {name + part for name in states for part in _PARTS} | set(states.values())
        self.tensor_infos = {
            name: self._codes[name].form if name in states else form
            for name, form in folder.tensor_infos.items()
            if name not in inner
        }

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows in fp32."""
        if name not in self._codes:
            return self._stored.rows(name, start, stop)
        code = self._codes[name]
        width = code.form.row_bytes // code.form.dtype.itemsize
        first, last = start * width, stop * width
        packed = self._stored.read_stored_rows(name, first // 2, (last + 1) // 2).flatten().to(torch.int32)
        halves = torch.stack([packed >> 4, packed & 15], 1).flatten()[first % 2 :][: last - first]
        scales = self._scales(name, code, first // code.block, -(-last // code.block))
        blocks = torch.arange(first, last) // code.block - first // code.block
        return (code.values[halves] * scales[blocks]).reshape(stop - start, *code.form.shape[1:])

    def _scales(self, name: str, code: _Code, start: int, stop: int) -> Tensor:
        scales = self._stored.rows(f"{name}.absmax", start, stop)
        if code.nested is None:
            return scales
        blocks = torch.arange(start, stop) // code.nested.block
        return code.nested.values[scales.long()] * code.nested.scales[blocks] + code.nested.offset

    def _code(self, name: str, state: str) -> _Code:
        found = self._state(state)
        form = TensorInfo(tuple(found["shape"]), getattr(torch, found["dtype"]))
        return _Code(form, self._stored.whole(f"{name}.quant_map"), found["blocksize"], self._nested(name, found))

    def _nested(self, name: str, found: dict[str, Any]) -> _Nested | None:
        if f"{name}.nested_absmax" not in self._stored.tensor_infos:
            return None
        values, scales = (self._stored.whole(f"{name}.nested_{part}") for part in ("quant_map", "absmax"))
        return _Nested(values, scales, found["nested_blocksize"], found["nested_offset"])

    def _state(self, name: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(bytes(self._stored.whole(name).tolist()))
        except ValueError as error:
            raise SourceError(f"{self.source}: {name} is no quantisation state; fetch it again") from error
        if not {"blocksize", "dtype", "shape"} <= found.keys():
            raise SourceError(f"{self.source}: {name} is no quantisation state; fetch it again")
        return found
