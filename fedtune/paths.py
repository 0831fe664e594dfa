"""The folders of fedtune: the run store, the files of runs and the cache of sources."""

import os
from pathlib import Path

__all__ = ["get_cache_folder", "get_home_folder", "get_runs_folder"]


def get_home_folder() -> Path:
    """Return ``$FEDTUNE_HOME``, or ``~/.fedtune``."""
    return Path(os.environ.get("FEDTUNE_HOME", "~/.fedtune")).expanduser().absolute()


def get_cache_folder() -> Path:
    """Return the folder of fetched models and data, addressed by the SHA-256 of their origin."""
    given = os.environ.get("FEDTUNE_CACHE")
    return get_home_folder() / "cache" if given is None else Path(given).expanduser().absolute()


def get_runs_folder() -> Path:
    """Return the folder of runs.

    Each run has a folder for its checkpoints, its plot and the updates of the current round.
    """
    return get_home_folder() / "runs"
