"""Keeps traces and measured constants in ``FEDTUNE_HOME/plans``, one file each, named by the hash of their key."""

import hashlib
import json
from pathlib import Path
from typing import Any

from fedtune.files import write_bytes_atomically
from fedtune.paths import get_home_folder

__all__ = ["read_entry", "write_entry"]


def read_entry(key: list[str]) -> Any:
    """Return what was stored under a key; None if nothing was, or if the file is damaged."""
    try:
        entry = json.loads(_path(key).read_bytes())
        return entry["value"] if entry["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_entry(key: list[str], value: Any) -> None:
    """Store a value under a key."""
    write_bytes_atomically(_path(key), json.dumps({"key": key, "value": value}).encode())


def _path(key: list[str]) -> Path:
    return get_home_folder() / "plans" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()}.json"
