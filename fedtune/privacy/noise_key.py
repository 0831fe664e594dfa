"""The secret that noise comes from: made once by the machine that adds the noise, and never sent."""

import os
from pathlib import Path

from fedtune.errors import StoreError
from fedtune.files import write_bytes_atomically

__all__ = ["load_or_create_noise_key"]

_BYTES = 32


def load_or_create_noise_key(folder: Path) -> bytes:
    """256 bits from the operating system, kept in ``folder`` for its owner alone, so that a resumed run finds them.

    Raises StoreError when they cannot be kept, or what is there is something else: noise from it might be guessed.
    """
    path = folder / "noise.key"
    if not path.exists():
        write_bytes_atomically(path, os.urandom(_BYTES))  # made with mode 0600
    found = path.read_bytes()
    if len(found) != _BYTES:
        raise StoreError(f"{path} is damaged; delete it, and what goes on from here has noise of its own")
    return found
