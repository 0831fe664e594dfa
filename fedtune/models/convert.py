"""Models that do not come as safetensors, converted once into the cache, under the hash of what they came from."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fedtune.errors import ChecksumError, SourceError
from fedtune.files import sha256
from fedtune.home import cache
from fedtune.models.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteForImageClassification
from fedtune.models.logistic import LogisticConfig, LogisticForImageClassification
from fedtune.models.quiet import quiet
from fedtune.samples import keep

__all__ = ["from_gguf", "from_published_lite0", "logistic"]

LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def from_gguf(file: Path) -> Path:
    """The folder with a GGUF model's dequantised float32 weights and its tokenizer."""
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise SourceError(f"{file} is not a GGUF file; check model.source")
    folder = cache() / "gguf" / sha256(file)
    keep(folder, lambda beside: _dequantise(file, beside), f"the weights of {file.name}")
    return folder


def from_published_lite0(file: Path) -> Path:
    """The folder with the ImageNet weights of EfficientNet-Lite0.

    They were only ever published as a pickle: it is read because its checksum is pinned, and as plain tensors only.
    """
    if (found := sha256(file)) != LITE0_SHA256:
        raise ChecksumError(f"{file.name} has sha256 {found}, but {LITE0_SHA256} was published; do not trust it")
    folder = cache() / "efficientnet-lite" / found
    keep(folder, lambda beside: _save_lite0(file, beside), f"the weights of {file.name}")
    return folder


def logistic() -> Path:
    """The folder with an untrained logistic regression: all zero, with a head of two labels to be replaced."""
    folder = cache() / "logistic" / "28"
    keep(folder, lambda beside: _save(LogisticForImageClassification(LogisticConfig()), beside), "sample:logistic")
    return folder


def _dequantise(file: Path, into: Path) -> None:
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            _forget_quantisation(model)
            model.save_pretrained(into)
            tokenizer.save_pretrained(into)
    except (KeyError, NotImplementedError, RuntimeError, ValueError) as error:
        raise SourceError(f"{file} cannot be read as a language model: {error}; use a safetensors release") from error


def _forget_quantisation(model: Any) -> None:
    """The weights are plain tensors by now; with these marks left ``save_pretrained`` refuses."""
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config


def _save_lite0(file: Path, into: Path) -> None:
    model = EfficientNetLiteForImageClassification(EfficientNetLiteConfig(num_labels=1000))
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True), strict=True)
    _save(model, into)


def _save(model: PreTrainedModel, into: Path) -> None:
    with quiet():
        model.save_pretrained(into)
