"""The memory that counts against a device's budget. This module does not import torch."""

import psutil

__all__ = ["count_held_bytes", "read_held_bytes"]

_HOT_FILES = 64_000_000
"""Bytes of files, mostly code of libraries, without which a trainer is slow. The system can take back the others."""


def count_held_bytes(anonymous: int, files: int) -> int:
    """Return what a process needs of these bytes: its own memory, and the pages of files that it uses all the time."""
    return anonymous + min(files, _HOT_FILES)


def read_held_bytes(process: psutil.Process | None = None) -> int:
    """Return what a process, or this one, needs now. All resident memory counts if the system tells no parts of it."""
    memory = (process or psutil.Process()).memory_info()
    files = getattr(memory, "shared", 0)
    return count_held_bytes(memory.rss - files, files) if files else int(memory.rss)
