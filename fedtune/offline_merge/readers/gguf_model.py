"""Read GGUF files of language models, dequantised one tensor or a few rows at a time.

transformers maps the file's names to its own and undoes what the converter changed in some tensors. This needs the
whole tensor; one is cached. Embeddings, the largest tensors, are read row by row.
"""

import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from fedtune.errors import ModelError, SourceError
from fedtune.models.transformers_logging import silence_transformers
from fedtune.offline_merge.readers.model_reader import ModelReader
from fedtune.offline_merge.safetensors_layout import TensorInfo

__all__ = ["GgufModelReader"]

_ROW_BY_ROW = ("token_embd.weight",)
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufModelReader(ModelReader):
    """The tensors of a GGUF file under transformers' names."""

    def __init__(self, file: Path, origin: str) -> None:
        self.source, self.files = origin, (file,)
        with file.open("rb") as opened:
            if opened.read(4) != b"GGUF":
                raise SourceError(f"{file} is not a GGUF file; check the path")
        try:
            with silence_transformers():
                self._read(file)
        except (KeyError, NotImplementedError, ValueError) as error:
            raise SourceError(f"{file} cannot be read as a language model: {error}; use safetensors") from error
        self._kept: tuple[str, Tensor] | None = None

    def _read(self, file: Path) -> None:
        parsed = load_gguf_checkpoint(str(file))
        self._config: PretrainedConfig = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(self._config)
        self._parsed = {**parsed, "tensors": {}}
        reader = GGUFReader(file)
        architecture = str(reader.fields["general.architecture"].contents())
        kind = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
        self._processor = kind(config=parsed["config"])
        self._names: dict[str, str] = get_gguf_hf_weights_map(skeleton, self._processor)
        # The reader's tensors map the file; what is kept of them does not.
        stored = {tensor.name: _Stored(tensor) for tensor in reader.tensors}
        self._stored = {self._names[name]: found for name, found in stored.items() if name in self._names}
        shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
        self.tensor_infos = {name: TensorInfo(shapes[name], found.dtype) for name, found in self._stored.items()}
        self.is_quantised = any(found.quantised for found in stored.values())

    @cached_property
    def folder(self) -> Path:  # type: ignore[override]
        """A folder with config.json and the tokenizer. It exists as long as this object."""
        self._folder = tempfile.TemporaryDirectory(prefix="fedtune-gguf-")
        [file] = self.files
        with silence_transformers():
            self._config.save_pretrained(self._folder.name)
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(self._folder.name)
        return Path(self._folder.name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return dequantised rows in fp32."""
        found = self._stored[name]
        if found.name in _ROW_BY_ROW:
            return torch.from_numpy(found.rows(self.files[0], start, stop))
        if self._kept is None or self._kept[0] != name:
            self._kept = None
            self._kept = (name, self._processed(found))
        whole = self._kept[1]
        return whole[start:stop] if whole.dim() else whole

    def _processed(self, found: "_Stored") -> Tensor:
        whole = found.rows(self.files[0], 0, found.height)
        done = self._processor.process(
            weights=whole, name=found.name, tensor_key_mapping=self._names, parsed_parameters=self._parsed
        )
        if done.name is None:  # it went into the parsed parameters, alone or beside others
            taken = self._parsed["tensors"].pop(self._names.get(found.name, found.name), None)
            if taken is None:
                raise ModelError(f"{self.source}: {found.name} is spread over several tensors; use safetensors")
            return torch.as_tensor(taken)
        return torch.from_numpy(np.ascontiguousarray(done.weights))


class _Stored:
    """Where a tensor is in the file, and how it is quantised."""

    def __init__(self, tensor: Any) -> None:
        self.name: str = tensor.name
        self._type = tensor.tensor_type
        self._offset = int(tensor.data_offset)
        self._shape: tuple[int, ...] = tuple(int(side) for side in reversed(tensor.shape))
        self._row_bytes = int(tensor.n_bytes) // self.height

    @property
    def height(self) -> int:
        """The number of rows."""
        return self._shape[0]

    @property
    def quantised(self) -> bool:
        """Whether the values have fewer than sixteen bits."""
        return self._type.name not in _PLAIN

    @property
    def dtype(self) -> torch.dtype:
        """The data type of plain values; fp16 for quantised ones."""
        return _PLAIN.get(self._type.name, torch.float16)

    def rows(self, file: Path, start: int, stop: int) -> "np.ndarray[Any, np.dtype[np.float32]]":
        """Return rows ``start`` to ``stop``, dequantised."""
        count, offset = (stop - start) * self._row_bytes, self._offset + start * self._row_bytes
        raw = np.fromfile(file, dtype=np.uint8, count=count, offset=offset)
        # A vector is one run of blocks.
        numbers = dequantize(raw if len(self._shape) == 1 else raw.reshape(stop - start, -1), self._type)
        return np.asarray(numbers, dtype=np.float32).reshape(stop - start, *self._shape[1:])
