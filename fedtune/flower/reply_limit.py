"""The largest reply that a run's rounds have asked of a client so far: told by the run's process, read by the gateway.

A small file in the run's folder, since the two are processes of their own, and either may be started anew.
"""

from pathlib import Path

from fedtune.files import write_bytes_atomically

__all__ = ["OVERHEAD", "raise_reply_limit", "read_reply_limit"]

OVERHEAD = 1 << 18
"""Bytes of a reply beside its payload: heads, names, the report."""


def raise_reply_limit(folder: Path, count: int) -> None:
    """Let replies of a run have so many bytes, or more where some round before allowed more."""
    if count > (read_reply_limit(folder) or 0):
        write_bytes_atomically(_path(folder), str(count).encode())


def read_reply_limit(folder: Path) -> int | None:
    """What is allowed in the run whose folder this is; None before its first round."""
    try:
        return int(_path(folder).read_text())
    except (FileNotFoundError, ValueError):
        return None


def _path(folder: Path) -> Path:
    return folder / "largest-reply"
