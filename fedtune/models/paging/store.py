"""A store: one file with the matrices of a frozen model, each from a page boundary on, and an index beside it.

It is made once, in the cache, under a name that depends on the source and on the row format of each matrix. A store
whose file has another size or hash than its index says is refused. The hash is computed again whenever the file's time
of change is not the one of the last check.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedtune.errors import SourceError, StoreError
from fedtune.files import hash_file, write_bytes_atomically
from fedtune.models.paging.byte_readers import ByteReader
from fedtune.models.paging.paged_matrix import PagedMatrix
from fedtune.models.paging.row_formats import ROW_FORMATS, decode_rows
from fedtune.models.paging.source_tensors import SourceTensor
from fedtune.paths import get_cache_folder
from fedtune.sample_packages import make_folder_once

__all__ = ["make_store", "open_store"]

_PAGE = 4096
_PORTION = 4 << 20
"""Numbers that are converted at a time."""
_WEIGHTS, _INDEX, _CHECKED = "weights.bin", "index.json", "checked.json"


def make_store(tensors: Mapping[str, SourceTensor], forms: Mapping[str, str]) -> Path:
    """Return the folder of the store of some matrices in the given row formats, made if it is not in the cache."""
    folder = get_cache_folder() / "paged" / _name_store(tensors, forms)
    if not folder.is_dir():
        _require_room(folder, sum(_pad(_count_bytes(tensors[name], form)) for name, form in forms.items()))
    make_folder_once(folder, lambda beside: _fill(beside, tensors, forms), "the paged weights")
    return folder


def open_store(folder: Path, dtype: torch.dtype, read: Callable[[Path], ByteReader]) -> dict[str, PagedMatrix]:
    """Return the matrices of a store by name, for computing in ``dtype``. SourceError if the store was changed."""
    index = _read_index(folder)
    _require_unchanged(folder, index)
    reader = read(folder / _WEIGHTS)
    return {
        name: PagedMatrix(name, reader, form, rows, width, offset, dtype)
        for name, (form, rows, width, offset) in index["matrices"].items()
    }


def _name_store(tensors: Mapping[str, SourceTensor], forms: Mapping[str, str]) -> str:
    """The source's files by path, size and time of change, because hashing gigabytes at each start takes long."""
    files = sorted({tensors[name].file for name in forms})
    origin = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([origin, sorted(forms.items())]).encode()).hexdigest()


def _count_bytes(tensor: SourceTensor, form: str) -> int:
    return tensor.rows * ROW_FORMATS[form].count_row_bytes(tensor.width)


def _pad(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _require_room(folder: Path, needed: int) -> None:
    place = next(parent for parent in folder.parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise SourceError(
            f"model.paged needs {needed / 1e6:,.0f} MB in {folder.parent}, which has {free / 1e6:,.0f} MB left; free "
            "some, set FEDTUNE_CACHE to another place, or take paged: nf4"
        )


def _fill(beside: Path, tensors: Mapping[str, SourceTensor], forms: Mapping[str, str]) -> None:
    """Write the weights, then the index, and flush both."""
    matrices: dict[str, tuple[str, int, int, int]] = {}
    offset = 0
    with (beside / _WEIGHTS).open("wb") as file:
        for name, form in forms.items():
            tensor = tensors[name]
            matrices[name] = (form, tensor.rows, tensor.width, offset)
            for portion in _convert(name, tensor, form):
                file.write(portion.contiguous().numpy().data)
            offset += _pad(_count_bytes(tensor, form))
            file.write(bytes(offset - file.tell()))
        file.flush()
        os.fsync(file.fileno())
    index = {"matrices": matrices, "size": offset, "sha256": hash_file(beside / _WEIGHTS)}
    write_bytes_atomically(beside / _INDEX, json.dumps({**index, "digest": _digest(index)}).encode())
    _note_check(beside)


def _convert(name: str, tensor: SourceTensor, form: str) -> Iterator[Tensor]:
    """The bytes of a matrix in its row format. A matrix that has it already is copied."""
    height = max(1, tensor.rows if tensor.rope_heads else _PORTION // tensor.width)
    for start in range(0, tensor.rows, height):
        raw = tensor.read_bytes(start, min(start + height, tensor.rows))
        encode = ROW_FORMATS[form].encode
        if tensor.form == form or encode is None:
            yield raw
            continue
        rows = decode_rows(tensor.form, raw, tensor.width).float()
        if not bool(rows.isfinite().all()):
            raise SourceError(f"{tensor.file} holds {name} with infinite weights or nan; fetch another release")
        yield encode(rows)


def _digest(index: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index).encode()).hexdigest()


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index: dict[str, Any] = json.loads((folder / _INDEX).read_bytes())
        digest = index.pop("digest")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise _refusal(folder / _INDEX, "cannot be read") from error
    if digest != _digest(index):
        raise _refusal(folder / _INDEX, "was changed")
    return index


def _require_unchanged(folder: Path, index: Mapping[str, Any]) -> None:
    file = folder / _WEIGHTS
    if not file.is_file():
        raise _refusal(file, "is missing")
    if file.stat().st_size != index["size"]:
        raise _refusal(file, "was cut short" if file.stat().st_size < index["size"] else "has grown")
    if _read_check(folder) == file.stat().st_mtime_ns:
        return
    if hash_file(file) != index["sha256"]:
        raise _refusal(file, "was changed or is damaged")
    with suppress(StoreError):  # a cache that cannot be written is hashed each time
        _note_check(folder)


def _read_check(folder: Path) -> int | None:
    try:
        found = json.loads((folder / _CHECKED).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, int) else None


def _note_check(folder: Path) -> None:
    """Note when the file was changed last, now that its hash is right."""
    changed = (folder / _WEIGHTS).stat().st_mtime_ns
    write_bytes_atomically(folder / _CHECKED, json.dumps(changed).encode())


def _refusal(file: Path, what: str) -> SourceError:
    return SourceError(f"{file} {what} since it was made; delete {file.parent}, and it is made again")
