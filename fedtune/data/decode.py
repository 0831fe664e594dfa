"""Decodes images to RGB bytes. Errors name the image that cannot be read."""

import io
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedtune.data.table import Table
from fedtune.errors import DataError

if TYPE_CHECKING:
    import PIL.Image

__all__ = ["Unreadable", "decode", "describe_picture", "readable"]

Bytes = NDArray[np.uint8]
Decoder = Callable[[Mapping[str, Any], str], object]
"""Decodes a record of ``bytes`` and ``path`` that has a name in messages; raises Unreadable."""

_SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")
_MOST_SIXTEEN = 65535
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error)
"""The exceptions that Pillow raises for damaged files and unknown formats."""


class Unreadable(DataError):  # noqa: N818
    """An image or a recording that cannot be decoded."""


def describe_picture(picture: Mapping[str, Any], row: int) -> str:
    """Return the name of an image in messages: its path, or its row counted from 1."""
    return str(picture["path"]) if picture.get("path") else f"the image in row {row + 1}"


def decode(picture: Mapping[str, Any], name: str) -> Bytes:
    """Decode an image to uint8 [height, width, 3], rotated by its EXIF orientation.

    Grey images of 16 bits are scaled to 8 bits. Raises Unreadable with the image's name.
    """
    import PIL.Image  # imported here: data without encoded images does not need Pillow
    import PIL.ImageOps

    try:
        content = picture["bytes"] if picture["bytes"] is not None else Path(picture["path"]).read_bytes()
        with PIL.Image.open(io.BytesIO(content)) as opened:
            return _rgb(PIL.ImageOps.exif_transpose(opened))
    except (*_BROKEN, PIL.Image.DecompressionBombError) as error:
        reason = "it is none of the known formats" if isinstance(error, PIL.UnidentifiedImageError) else _said(error)
        raise Unreadable(
            f"{name} cannot be read as an image ({reason}); fix or remove the image, or set data.skip_unreadable"
        ) from error


def readable(table: Table, column: str, decode: Decoder, *, skip: bool) -> tuple[Table, list[str]]:
    """Return the table without unreadable files of a column, and the names of those left out.

    With ``skip``, missing and undecodable files are left out. Without it, Unreadable is raised for the first missing
    file.
    """
    kept: list[int] = []
    lost: list[str] = []
    for row, record in enumerate(table.records(column)):
        name = str(record["path"]) if record.get("path") else f"the {column} in row {row + 1}"
        missing = record["bytes"] is None and not Path(record["path"]).is_file()
        if missing and not skip:
            raise Unreadable(f"there is no {column} {name}; check data.columns.{column}, or set data.skip_unreadable")
        if missing or (skip and not _decodes(decode, record, name)):
            lost.append(name)
        else:
            kept.append(row)
    return table.select(kept) if lost else table, lost


def _decodes(decode: Decoder, record: Mapping[str, Any], name: str) -> bool:
    try:
        decode(record, name)
    except Unreadable:
        return False
    return True


def _said(error: Exception) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split()).rstrip(".")


def _rgb(image: "PIL.Image.Image") -> Bytes:
    if image.mode in (*_SIXTEEN, "I"):
        grey = _eight_bits(np.asarray(image).astype(np.int64))
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("its pixels are real numbers of unknown range; save it with 8 or 16 bits")
    return np.asarray(image.convert("RGB"))


def _eight_bits(grey: NDArray[np.int64]) -> Bytes:
    """Scale 0..65535 to 0..255."""
    if grey.min() < 0 or grey.max() > _MOST_SIXTEEN:
        raise ValueError("its pixels have more than 16 bits; save it with 8 or 16")
    return np.round(grey / 257).astype(np.uint8)
