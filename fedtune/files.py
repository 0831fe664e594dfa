"""Files that are whole or absent: written beside, flushed to disk, then renamed."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedtune.errors import StoreError

__all__ = ["hash_file", "replace_file_atomically", "write_bytes_atomically"]


@contextmanager
def replace_file_atomically(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; it takes the place of ``path`` when the block ends well.

    Raises StoreError, with nothing left behind, when the disk is full or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        beside = Path(name)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}; free or choose another place") from error
    try:
        yield beside
        _flush(beside)
        beside.replace(path)
        _flush(path.parent)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}; free or choose another place") from error
    finally:
        beside.unlink(missing_ok=True)


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write bytes so that ``path`` holds all of them or what it held before."""
    with replace_file_atomically(path) as beside:
        beside.write_bytes(content)


def hash_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
