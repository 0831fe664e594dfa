"""The secret key of the noise. The machine that adds the noise creates it once and never sends it."""

import os
from pathlib import Path

from fedtune.errors import StoreError
from fedtune.files import write_bytes_atomically

__all__ = ["load_or_create_noise_key"]

_BYTES = 32


def load_or_create_noise_key(folder: Path) -> bytes:
    """Return the 256-bit key in ``folder``, created from the operating system's randomness if it does not exist.

    Only the owner can read the file. A resumed run uses the same key. Raises StoreError when the key cannot be written,
    or the file has the wrong size, since noise from such a key might be predictable.
    """
    path = folder / "noise.key"
    if not path.exists():
        write_bytes_atomically(path, os.urandom(_BYTES))  # created with mode 0600
    found = path.read_bytes()
    if len(found) != _BYTES:
        raise StoreError(f"{path} is damaged; delete it, and what goes on from here has noise of its own")
    return found
