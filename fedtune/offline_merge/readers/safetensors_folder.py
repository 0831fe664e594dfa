"""Read a folder of safetensors files, single or in shards, as transformers writes it."""

from pathlib import Path

import torch
from torch import Tensor

from fedtune.models.sources import resolve_model_source
from fedtune.offline_merge.readers.model_reader import ModelReader
from fedtune.offline_merge.safetensors_layout import Reader, read_tensor_locations
from fedtune.offline_merge.weight_files import check_index, check_once, shards

__all__ = ["SafetensorsModelReader", "convert_to_fp32"]


class SafetensorsModelReader(ModelReader):
    """The tensors of a folder, as they are stored."""

    def __init__(self, folder: Path, origin: str, files: tuple[Path, ...] | None = None) -> None:
        self.source, self.folder = origin, folder
        self.files = _found(folder) if files is None else files
        self._reader = Reader()
        read = [(file, read_tensor_locations(file)) for file in self.files]
        check_once(read)
        self._places = {name: (file, place) for file, held in read for name, place in held.items()}
        if files is None:
            check_index(folder, self._places)
        self.tensor_infos = {name: place.form for name, (_, place) in self._places.items()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows in fp32; integers unchanged."""
        return convert_to_fp32(self.read_stored_rows(name, start, stop))

    def read_stored_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows in the stored data type."""
        file, place = self._places[name]
        return self._reader.rows(file, place, start, stop)


def _found(folder: Path) -> tuple[Path, ...]:
    """Return the files of a model; SourceError for pickles."""
    resolve_model_source(f"path:{folder}", "the path")
    return shards(folder)


def convert_to_fp32(tensor: Tensor) -> Tensor:
    """Convert real numbers to fp32. Integers stay the same."""
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor
