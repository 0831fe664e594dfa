"""Reads a folder of images or wav files that has one subfolder per class."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np

from fedtune.data.column import Column, Values, as_picture, objects
from fedtune.data.listing import files_in, part_named, parts_of
from fedtune.data.table import Classes, Kind, Pictures, Recordings, Table
from fedtune.errors import DataError

__all__ = ["class_folder", "has_metadata_table"]

_DESCRIPTIONS = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def has_metadata_table(folder: Path) -> bool:
    """Return whether the folder has a metadata file that ``datasets`` reads."""
    return any(file.name in _DESCRIPTIONS for file in folder.rglob("metadata.*"))


def class_folder(folder: Path, *, parts: bool) -> dict[str, Table]:
    """Return tables with the columns image and label, or audio and label.

    They are the splits if ``parts`` is set and folders are named after splits. Wav files are read where there is no
    image. The class of a file is its parent folder, if all files lie at the same depth and no two parent folders share
    a name. Otherwise it is the first folder on the file's path.
    """
    column, kind = "image", cast("Kind", Pictures())
    if not (files := files_in(folder, _endings())):
        column, kind, files = "audio", Recordings(), files_in(folder, (".wav", ".wave"))
    if not files:
        raise DataError(f"{folder} holds no example; bring data")
    found = parts_of(files, folder, named=parts, by_file=False)
    ways = {file: _way(file.relative_to(folder), parts=parts) for file in files}
    flat = next((file for file in files if not ways[file]), None)
    if flat is not None:
        raise DataError(f"{flat} is not in the folder of a class; put each file into the folder of its class")
    leaf = _leaves_are_classes(list(ways.values()))
    classes = {file: way[-1 if leaf else 0] for file, way in ways.items()}
    names = sorted(set(classes.values()))
    numbers = {name: number for number, name in enumerate(names)}
    kinds: dict[str, Kind] = {column: kind, "label": Classes(tuple(names))}
    return {
        part: Table(_columns(column, of, [numbers[classes[file]] for file in of]), kinds) for part, of in found.items()
    }


def _endings() -> tuple[str, ...]:
    """Return the file extensions that Pillow can open."""
    import PIL.Image

    PIL.Image.init()
    return tuple(ending for ending, form in PIL.Image.EXTENSION.items() if form in PIL.Image.OPEN)


def _way(file: Path, *, parts: bool) -> tuple[str, ...]:
    """Return the folders above a file, without those named after a split."""
    return tuple(name for name in file.parts[:-1] if not (parts and part_named(name)))


def _leaves_are_classes(ways: Sequence[tuple[str, ...]]) -> bool:
    above: dict[str, set[tuple[str, ...]]] = {}
    for way in ways:
        above.setdefault(way[-1], set()).add(way)
    return len({len(way) for way in ways}) == 1 and all(len(same) == 1 for same in above.values())


def _columns(column: str, files: Sequence[Path], labels: list[int]) -> dict[str, Column]:
    return {column: Values(objects(map(as_picture, files))), "label": Values(np.array(labels, np.int64))}
