"""The secret that noise comes from: made once by the machine that adds the noise, and never sent."""

import os
from pathlib import Path

from fedtune.files import write

__all__ = ["secret"]

_BYTES = 32


def secret(folder: Path) -> bytes:
    """256 bits from the operating system, kept in ``folder`` for its owner alone, so that a resumed run finds them."""
    path = folder / "noise.key"
    if not path.exists():
        write(path, os.urandom(_BYTES))  # made with mode 0600
    return path.read_bytes()
