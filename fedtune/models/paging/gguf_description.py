"""The description of a GGUF file in the cache: its configuration, tokenizer, small tensors and the places of matrices.

Reading it needs neither transformers nor gguf, which made it.
"""

import json
from pathlib import Path

from fedtune.errors import SourceError
from fedtune.files import hash_file
from fedtune.models.blocks.preference import avoids_transformers
from fedtune.models.child_work import run_in_child
from fedtune.models.paging.gguf_description_files import MATRICES, SMALL
from fedtune.models.paging.source_tensors import SourceTensor, list_safetensors
from fedtune.paths import get_cache_folder
from fedtune.sample_packages import make_folder_once

__all__ = ["describe_gguf", "list_described_tensors"]


def describe_gguf(file: Path) -> Path:
    """Return the folder with the configuration, the tokenizer, the small tensors and the places of the matrices."""
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise SourceError(f"{file} is not a GGUF file; check model.source")
    folder = get_cache_folder() / "gguf" / f"{hash_file(file)}-blocks"
    make_folder_once(folder, lambda beside: _describe(file, beside), f"the description of {file.name}")
    return folder


def list_described_tensors(folder: Path, file: Path) -> dict[str, SourceTensor]:
    """Return the tensors of a described GGUF file, by transformers' names."""
    found = list_safetensors([folder / SMALL])
    for name, (offset, shape, form, heads) in json.loads((folder / MATRICES).read_bytes()).items():
        found[name] = SourceTensor(file, offset, tuple(shape), form, heads)
    return found


def _describe(file: Path, into: Path) -> None:
    if avoids_transformers() and run_in_child("describe-gguf", str(file), into):
        return
    from fedtune.models.paging.gguf_source import write_description  # it needs transformers

    write_description(file, into)
