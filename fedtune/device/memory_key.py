"""The key that encrypts a device's memory of earlier tasks. It never leaves the device."""

import os
from pathlib import Path

from fedtune.errors import StoreError
from fedtune.files import write_bytes_atomically

__all__ = ["KEY_BYTES", "KEY_NAME", "load_or_create_memory_key", "read_memory_key"]

KEY_BYTES = 32
KEY_NAME = "memory.key"


def load_or_create_memory_key(folder: Path) -> bytes:
    """Return the run's key in ``folder``, created from the operating system's randomness if it does not exist."""
    path = folder / KEY_NAME
    if not path.exists():
        write_bytes_atomically(path, os.urandom(KEY_BYTES))  # created with mode 0600
    return read_memory_key(path)


def read_memory_key(path: Path) -> bytes:
    """Return the key in a file; StoreError if it is missing, has another size or can be read by other users."""
    try:
        content, mode = path.read_bytes(), path.stat().st_mode
    except OSError as error:
        raise StoreError(
            f"the memory key {path} cannot be read ({error.strerror}); mount it, or name another"
        ) from error
    if mode & 0o077:
        raise StoreError(f"the memory key {path} can be read by other users; chmod 600 it")
    if len(content) != KEY_BYTES:
        raise StoreError(
            f"the memory key {path} has {len(content)} bytes and needs {KEY_BYTES}; make one by "
            f"head -c {KEY_BYTES} /dev/urandom > FILE, or delete it with the files beside it to start anew"
        )
    return content
