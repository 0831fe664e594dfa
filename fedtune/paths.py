"""Where fedtune keeps what outlives a command: the store, the runs' files and the cache of sources."""

import os
from pathlib import Path

__all__ = ["get_cache_folder", "get_home_folder", "get_runs_folder"]


def get_home_folder() -> Path:
    """``$FEDTUNE_HOME``, or ``~/.fedtune``."""
    return Path(os.environ.get("FEDTUNE_HOME", "~/.fedtune")).expanduser().absolute()


def get_cache_folder() -> Path:
    """Fetched models and data, addressed by the SHA-256 of what they were made from."""
    given = os.environ.get("FEDTUNE_CACHE")
    return get_home_folder() / "cache" if given is None else Path(given).expanduser().absolute()


def get_runs_folder() -> Path:
    """One folder per run: its checkpoints, its picture and the contributions of the round in flight."""
    return get_home_folder() / "runs"
