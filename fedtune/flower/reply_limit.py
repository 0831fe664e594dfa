"""The largest reply that a run accepts, in bytes. The process of the run writes it, and the gateway reads it.

It is a small file in the run's folder, because these are two processes and each may restart.
"""

from pathlib import Path

from fedtune.files import write_bytes_atomically

__all__ = ["OVERHEAD", "raise_reply_limit", "read_reply_limit"]

OVERHEAD = 1 << 18
"""Bytes of a reply besides its payload: headers, names and the report."""


def raise_reply_limit(folder: Path, count: int) -> None:
    """Raise the limit of a run to ``count`` bytes, unless it is larger already."""
    if count > (read_reply_limit(folder) or 0):
        write_bytes_atomically(_path(folder), str(count).encode())


def read_reply_limit(folder: Path) -> int | None:
    """Return the limit of the run with this folder; None before its first round."""
    try:
        return int(_path(folder).read_text())
    except (FileNotFoundError, ValueError):
        return None


def _path(folder: Path) -> Path:
    return folder / "largest-reply"
