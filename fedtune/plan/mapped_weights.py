"""Which weights a process reads in place: views of the mapped file, whose pages the system can drop."""

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from fedtune.errors import FedtuneError
from fedtune.models.blocks.choice import list_file_tensors
from fedtune.models.blocks.configuration import UnknownBlocksError
from fedtune.models.image_model_files import is_fedtune_image_model
from fedtune.models.paging.source_tensors import SourceTensor
from fedtune.models.sources import locate_model
from fedtune.recipe.schema import ModelSettings

__all__ = ["find_mapped_weights"]

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ADDED = (".lora_", ".adapters.", "fedkseed.")
"""Parts of the names of tensors that techniques add, which no file has."""


def find_mapped_weights(model: ModelSettings, dtypes: Mapping[str, torch.dtype]) -> set[str]:
    """Return the names of the parameters, given by type, that the file has in the very type in which they are loaded.

    A weight of another type is copied when it is read, and so are all tensors of a model whose matrices stay in a
    store. One that the file has under another name counts as most of the file. A file that cannot be read here is taken
    for one in single precision.
    """
    if model.paged or is_fedtune_image_model(locate_model(model)):
        return set()
    stored = _read_types(model)
    usual = Counter(stored.values()).most_common(1)[0][0] if stored else torch.float32
    return {
        name
        for name, dtype in dtypes.items()
        if dtype == stored.get(name.replace(".base_layer.", "."), usual) and not any(part in name for part in _ADDED)
    }


def _read_types(model: ModelSettings) -> dict[str, torch.dtype]:
    """Return the type of each tensor in the files; none if their heads cannot be read."""
    found: Mapping[str, SourceTensor] = {}
    with suppress(FedtuneError, UnknownBlocksError, OSError, ValueError):
        found = list_file_tensors(model, Path(locate_model(model)))
    return {name: _TYPES[one.form] for name, one in found.items() if one.form in _TYPES}
