"""The key that encrypts a device's memory of earlier tasks, or only tells whose it is. It never leaves the device.

Each run has its own. It lies in another folder than the memory, so that a copy of the memory does not contain it.
"""

import os
from pathlib import Path

from fedtune.errors import StoreError
from fedtune.files import write_bytes_atomically

__all__ = [
    "KEY_BYTES",
    "KEY_VARIABLE",
    "find_memory_key",
    "get_key_path",
    "load_or_create_memory_key",
    "read_memory_key",
    "use_memory_key",
]

KEY_BYTES = 32
KEY_VARIABLE = "FEDTUNE_MEMORY_KEY"
"""The environment variable that names a key in place of the run's own one, e.g. in a mounted keyring."""


def get_key_path(folder: Path) -> Path:
    """Return the path of the key of the memory in ``folder``: two folders up, and down again."""
    return folder.parents[1] / "memory-keys" / f"{folder.name}.key"


def use_memory_key(path: Path) -> None:
    """Let this process and its trainers use the key in a file; StoreError if it cannot be used."""
    read_memory_key(path)
    os.environ[KEY_VARIABLE] = str(path.absolute())


def find_memory_key(folder: Path) -> bytes:
    """Return the key that ``FEDTUNE_MEMORY_KEY`` names, or else the run's own key for ``folder``."""
    named = os.environ.get(KEY_VARIABLE)
    return read_memory_key(Path(named)) if named else load_or_create_memory_key(folder)


def load_or_create_memory_key(folder: Path) -> bytes:
    """Return the run's own key for ``folder``, created from the operating system's randomness if it does not exist."""
    path = get_key_path(folder)
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
        raise StoreError(f"the memory key {path} can be read by other users; chmod 600 it", code="memory-key")
    if len(content) != KEY_BYTES:
        raise StoreError(
            f"the memory key {path} has {len(content)} bytes and needs {KEY_BYTES}; make one by "
            f"head -c {KEY_BYTES} /dev/urandom > FILE, or delete it and the memory to start anew",
            code="memory-key",
        )
    return content
