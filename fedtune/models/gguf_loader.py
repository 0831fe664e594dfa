"""Dequantises GGUF files into the cache, under the hash of the file."""

from pathlib import Path
from typing import Any

import torch

from fedtune.errors import SourceError
from fedtune.files import hash_file
from fedtune.models.blocks.preference import avoids_transformers
from fedtune.models.child_work import run_in_child
from fedtune.paths import get_cache_folder
from fedtune.sample_packages import make_folder_once

__all__ = ["dequantise_gguf", "write_dequantised"]


def dequantise_gguf(file: Path) -> Path:
    """Return the folder with the float32 weights and the tokenizer of a GGUF model."""
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise SourceError(f"{file} is not a GGUF file; check model.source")
    folder = get_cache_folder() / "gguf" / hash_file(file)
    make_folder_once(folder, lambda beside: _dequantise(file, beside), f"the weights of {file.name}")
    return folder


def _dequantise(file: Path, into: Path) -> None:
    if not (avoids_transformers() and run_in_child("dequantise-gguf", str(file), into)):
        write_dequantised(file, into)


def write_dequantised(file: Path, into: Path) -> None:
    """Write the weights and the tokenizer into a folder; SourceError for a file that is not read."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # imported here: what is in the cache is read without

    from fedtune.models.transformers_logging import silence_transformers

    try:
        with silence_transformers():
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            _forget_quantisation(model)
            model.save_pretrained(into)
            tokenizer.save_pretrained(into)
    except (KeyError, NotImplementedError, RuntimeError, ValueError) as error:
        raise SourceError(f"{file} cannot be read as a language model: {error}; use a safetensors release") from error


def _forget_quantisation(model: Any) -> None:
    """Remove the marks of quantisation.

    The weights are plain tensors, but ``save_pretrained`` refuses a marked model.
    """
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
