"""A folder of safetensors files, single or in shards, as transformers writes it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedtune.errors import SourceError
from fedtune.fusion.layout import Place, Reader, places
from fedtune.fusion.weights import Weights
from fedtune.models.sources import resolve

__all__ = ["Folder", "as_fp32", "read_json", "shards"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class Folder(Weights):
    """The tensors of a folder, as they are stored."""

    def __init__(self, folder: Path, origin: str, files: tuple[Path, ...] | None = None) -> None:
        self.origin, self.folder = origin, folder
        self.files = shards(folder) if files is None else files
        self._reader = Reader()
        self._places: dict[str, tuple[Path, Place]] = {}
        for file in self.files:
            self._places |= {name: (file, place) for name, place in places(file).items()}
        self.forms = {name: place.form for name, (_, place) in self._places.items()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows in fp32; integers as they are."""
        return as_fp32(self.stored(name, start, stop))

    def stored(self, name: str, start: int, stop: int) -> Tensor:
        """Rows in the precision they are stored in."""
        file, place = self._places[name]
        return self._reader.rows(file, place, start, stop)


def as_fp32(tensor: Tensor) -> Tensor:
    """Real numbers in fp32, integers as they are."""
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file; SourceError when there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read as JSON ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise SourceError(f"{path} holds no JSON object; fetch it again")
    return found


def shards(folder: Path) -> tuple[Path, ...]:
    """The files that hold a folder's tensors; SourceError for pickles and for a shard the index names in vain."""
    resolve(f"path:{folder}", "the path")
    if (folder / _INDEX).is_file():
        return _indexed(folder, read_json(folder / _INDEX))
    if (folder / _SINGLE).is_file():
        return (folder / _SINGLE,)
    return tuple(sorted(folder.glob("*.safetensors")))


def _indexed(folder: Path, index: Mapping[str, Any]) -> tuple[Path, ...]:
    files = [folder / name for name in sorted(set(index.get("weight_map", {}).values()))]
    for file in files:
        if not file.is_file():
            raise SourceError(f"{folder / _INDEX} names the shard {file.name}, which is missing; fetch it again")
    return tuple(files)
