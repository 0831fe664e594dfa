"""A GGUF file as a source of paged weights: its blocks are copied as they are, so nothing is dequantised as a whole.

Beside the file's description the cache holds the configuration, the tokenizer and the small tensors, such as norms.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    LlamaTensorProcessor,
    TensorProcessor,
    get_gguf_hf_weights_map,
)
from transformers.models.auto.auto_factory import _get_model_class

from fedtune.errors import SourceError
from fedtune.models.paging.gguf_description_files import MATRICES, SMALL
from fedtune.models.paging.row_formats import find_gguf_format
from fedtune.models.paging.source_tensors import SourceTensor, reverse_rope_pairs
from fedtune.models.transformers_logging import silence_transformers

__all__ = ["write_description"]

_UNREADABLE = (
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)
"""What the readers of GGUF raise for files that are cut short, damaged or of an unknown architecture."""
_ALIKE = (TensorProcessor, LlamaTensorProcessor)
"""How transformers changes the tensors of an architecture: not at all, or by the order of rows."""


def write_description(file: Path, into: Path) -> None:
    """Write the description of a file into a folder; SourceError for a file that is not read."""
    try:
        with silence_transformers():
            config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
            matrices, small = _read_tensors(file, config)
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(into)
            config.architectures = [_get_model_class(config, AutoModelForCausalLM._model_mapping).__name__]
            config.save_pretrained(into)
            GenerationConfig.from_model_config(config).save_pretrained(into)
    except _UNREADABLE as error:
        raise SourceError(f"{file} cannot be read as a language model: {error}; use a safetensors release") from error
    (into / MATRICES).write_text(json.dumps(matrices), encoding="utf-8")
    save_file(small, into / SMALL)


def _read_tensors(file: Path, config: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The places of the matrices, and the contents of all other tensors."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    names = _map_names(config)
    processor = _find_processor(file, reader)
    matrices: dict[str, Any] = {}
    small: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        if tensor.name not in names:
            continue
        shape = tuple(int(size) for size in reversed(tensor.shape))
        form = find_gguf_format(tensor.tensor_type.name)
        if form is None:
            raise SourceError(
                f"{file} holds {tensor.name} as {tensor.tensor_type.name}, which model.paged does not read"
            )
        heads = _count_rope_heads(tensor.name, config) if processor is LlamaTensorProcessor else 0
        described = SourceTensor(file, int(tensor.data_offset), shape, form.name, heads if len(shape) == 2 else 0)
        if len(shape) == 2:
            matrices[names[tensor.name]] = (described.offset, shape, form.name, heads)
        else:
            small[names[tensor.name]] = _reorder(described.read_whole().float(), heads)
    return matrices, small


def _reorder(values: Tensor, heads: int) -> Tensor:
    """A bias of queries or keys in transformers' order."""
    return values[reverse_rope_pairs(len(values), heads)] if heads else values


def _find_processor(file: Path, reader: Any) -> type[TensorProcessor]:
    """How the architecture's tensors are changed; SourceError if not by the order of rows alone."""
    architecture = str(reader.fields["general.architecture"].contents())
    processor: type[TensorProcessor] = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    if processor not in _ALIKE:
        raise SourceError(
            f"{file} is a {architecture} model, whose GGUF tensors model.paged does not read; use a safetensors release"
        )
    return processor


def _map_names(config: Any) -> Mapping[str, str]:
    """transformers' name of each tensor of the file."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    names: Mapping[str, str] = get_gguf_hf_weights_map(skeleton, TensorProcessor())
    return names


def _count_rope_heads(name: str, config: Any) -> int:
    if ".attn_q." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".attn_k." in name else 0
