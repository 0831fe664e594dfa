"""Read the memory of this process: its peak, and what of it is anonymous and what belongs to files.

Anonymous pages hold tensors and objects; without swap, the system cannot take them back. Pages of files, such as
libraries and weights that are mapped from disk, can be dropped and read again. The peak never falls by itself, so
measure each case in its own process.
"""

import resource
import sys
import threading
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "MemoryWatch",
    "ResidentMemory",
    "peak_anonymous",
    "peak_rss",
    "read_mapped_bytes",
    "read_resident_memory",
    "reset_peak_rss",
]

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class ResidentMemory(NamedTuple):
    """Resident bytes. ``file_backed`` includes memory that is shared with other processes."""

    anonymous: int
    file_backed: int


def reset_peak_rss() -> None:
    """Reset the peak resident memory of this process, if the system supports it (Linux)."""
    if _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")


def peak_rss() -> int:
    """Return the peak resident memory in bytes since the last reset, or since the process started."""
    peak = _read_status().get("VmHWM")  # some kernels and sandboxes omit the line
    return _peak_since_start() if peak is None else peak


def read_resident_memory(process: int | None = None) -> ResidentMemory | None:
    """Return the resident memory of a process, or of this one; None if it has ended, or the system tells no parts."""
    found = _read_status(None if process is None else Path(f"/proc/{process}/status"))
    if "RssAnon" not in found:
        return None
    return ResidentMemory(found["RssAnon"], found.get("RssFile", 0) + found.get("RssShmem", 0))


def read_mapped_bytes() -> int | None:
    """Return the private memory of this process that may be written, resident or not; None if the system tells none."""
    return _read_status().get("VmData")


def peak_anonymous() -> int | None:
    """Return the peak of anonymous memory since the last reset; None if the system does not tell it apart.

    The system records the peak of resident memory alone. This is that peak without the pages of files that are held
    now: exact if these are as many as at the peak, and too low if more were read since. ``MemoryWatch`` looks on the
    way.
    """
    now = read_resident_memory()
    return None if now is None else max(now.anonymous, peak_rss() - now.file_backed)


class MemoryWatch:
    """Follows the memory of this process in a block, so that the peaks of its two parts are known.

    A thread reads them every ``seconds``. Shorter peaks are found too, since the system's own peak of resident memory
    contains them. Pages of files that are read and dropped between two looks then count as anonymous. Both peaks are
    None if the system does not tell the parts apart.
    """

    def __init__(self, seconds: float = 0.02) -> None:
        self.anonymous: int | None = None
        self.file_backed: int | None = None
        self._seconds, self._ended = seconds, threading.Event()
        self._thread = threading.Thread(target=self._follow, name="memory-watch", daemon=True)

    def __enter__(self) -> "MemoryWatch":
        reset_peak_rss()
        self._look()
        if self.anonymous is not None:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self.anonymous is None or self.file_backed is None:
            return
        self._thread.join()
        self._look()
        self.anonymous = max(self.anonymous, peak_rss() - self.file_backed)

    def _follow(self) -> None:
        while not self._ended.wait(self._seconds):
            self._look()

    def _look(self) -> None:
        if (now := read_resident_memory()) is not None:
            self.anonymous = max(now.anonymous, self.anonymous or 0)
            self.file_backed = max(now.file_backed, self.file_backed or 0)


def _read_status(path: Path | None = None) -> dict[str, int]:
    """Return the sizes that the system reports of a process, in bytes; none where there is no such file."""
    try:
        lines = (path or _STATUS).read_text(errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    sizes = (line.split() for line in lines if line.endswith(" kB"))
    return {words[0].removesuffix(":"): int(words[1]) * 1024 for words in sizes}


def _peak_since_start() -> int:
    """Return the peak from ``getrusage`` in bytes. The system reports bytes on macOS and kilobytes elsewhere."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
