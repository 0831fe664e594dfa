"""Where fedtune keeps what outlives a command: the store, the runs' files and the cache of sources."""

import os
from pathlib import Path

__all__ = ["cache", "home", "runs"]


def home() -> Path:
    """``$FEDTUNE_HOME``, or ``~/.fedtune``."""
    return Path(os.environ.get("FEDTUNE_HOME", "~/.fedtune")).expanduser().absolute()


def cache() -> Path:
    """Fetched models and data, addressed by the SHA-256 of what they were made from."""
    given = os.environ.get("FEDTUNE_CACHE")
    return home() / "cache" if given is None else Path(given).expanduser().absolute()


def runs() -> Path:
    """One folder per run: its checkpoints, its picture and the contributions of the round in flight."""
    return home() / "runs"
