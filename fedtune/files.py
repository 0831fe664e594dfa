"""Writes files atomically: to a temporary file in the same folder, flushed to disk, then renamed."""

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
    """Yield a temporary path beside ``path``, which replaces ``path`` when the block ends without an error.

    Raises StoreError when the disk is full or the folder cannot be written. Then nothing is left behind.
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
    """Write bytes atomically: ``path`` holds either all of them or its previous content."""
    with replace_file_atomically(path) as beside:
        beside.write_bytes(content)


def hash_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file, which is read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
