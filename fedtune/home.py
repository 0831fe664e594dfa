"""Where fedtune keeps what outlives a command: the store, the runs' files and the cache of sources."""

import os
from pathlib import Path

__all__ = ["cache", "home", "runs", "store_url"]


def home() -> Path:
    """``$FEDTUNE_HOME``, or ``~/.fedtune``."""
    return Path(os.environ.get("FEDTUNE_HOME", "~/.fedtune")).expanduser().absolute()


def cache() -> Path:
    """Fetched models and data, addressed by the SHA-256 of what they were made from."""
    return Path(os.environ["FEDTUNE_CACHE"]).absolute() if "FEDTUNE_CACHE" in os.environ else home() / "cache"


def runs() -> Path:
    """One folder per run: its checkpoints, its picture and the contributions of the round in flight."""
    return home() / "runs"


def store_url() -> str:
    """The SQLAlchemy URL of the default store."""
    return os.environ.get("FEDTUNE_STORE", f"sqlite:///{home() / 'store.sqlite'}")
