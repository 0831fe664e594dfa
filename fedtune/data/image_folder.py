"""Reads a folder of images that has one subfolder per class."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedtune.data.column import Column, Values, as_picture, objects
from fedtune.data.listing import files_in, part_named, parts_of
from fedtune.data.table import Classes, Kind, Pictures, Table
from fedtune.errors import DataError

__all__ = ["has_metadata_table", "image_folder"]

_DESCRIPTIONS = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def has_metadata_table(folder: Path) -> bool:
    """Return whether the folder has a metadata file that ``datasets`` reads."""
    return any(file.name in _DESCRIPTIONS for file in folder.rglob("metadata.*"))


def image_folder(folder: Path, *, parts: bool) -> dict[str, Table]:
    """Return tables with the columns image and label, by split if ``parts`` is set and folders are named after splits.

    The class of an image is its parent folder, if all images lie at the same depth and no two parent folders share a
    name. Otherwise it is the first folder on the image's path.
    """
    files = files_in(folder, _endings())
    if not files:
        raise DataError(f"{folder} holds no example; bring data")
    found = parts_of(files, folder, named=parts, by_file=False)
    ways = {file: _way(file.relative_to(folder), parts=parts) for file in files}
    flat = next((file for file in files if not ways[file]), None)
    if flat is not None:
        raise DataError(f"{flat} is not in the folder of a class; put each image into the folder of its class")
    leaf = _leaves_are_classes(list(ways.values()))
    classes = {file: way[-1 if leaf else 0] for file, way in ways.items()}
    names = sorted(set(classes.values()))
    numbers = {name: number for number, name in enumerate(names)}
    kinds: dict[str, Kind] = {"image": Pictures(), "label": Classes(tuple(names))}
    return {part: Table(_columns(of, [numbers[classes[file]] for file in of]), kinds) for part, of in found.items()}


def _endings() -> tuple[str, ...]:
    """Return the file extensions that Pillow can open."""
    import PIL.Image

    PIL.Image.init()
    return tuple(ending for ending, form in PIL.Image.EXTENSION.items() if form in PIL.Image.OPEN)


def _way(file: Path, *, parts: bool) -> tuple[str, ...]:
    """Return the folders above an image, without those named after a split."""
    return tuple(name for name in file.parts[:-1] if not (parts and part_named(name)))


def _leaves_are_classes(ways: Sequence[tuple[str, ...]]) -> bool:
    above: dict[str, set[tuple[str, ...]]] = {}
    for way in ways:
        above.setdefault(way[-1], set()).add(way)
    return len({len(way) for way in ways}) == 1 and all(len(same) == 1 for same in above.values())


def _columns(files: Sequence[Path], labels: list[int]) -> dict[str, Column]:
    return {"image": Values(objects(map(as_picture, files))), "label": Values(np.array(labels, np.int64))}
