"""Drop the pages of mapped Arrow files once their rows have been read.

A mapped page counts as resident memory of the process until the system needs it. A pass over a file that is larger than
a device's budget would therefore look like a process that exceeds it.
"""

import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path

__all__ = ["MappedPages", "iter_arrow_mappings"]

_MAPS, _PAGES = Path("/proc/self/maps"), Path("/proc/self/statm")
_MADV_DONTNEED = 4
"""Linux: the pages leave this process; the next access reads them from the file again."""


class MappedPages:
    """Keeps the mapped pages that a pass over Arrow files adds to this process below ``limit`` bytes (Linux)."""

    def __init__(self, limit: int = 64 << 20) -> None:
        self._limit, self._begun = limit, _count_file_backed()

    def drop_read(self) -> None:
        """Drop the pages of all mapped Arrow files if the pass has added more than the limit."""
        if _count_file_backed() - self._begun > self._limit:
            for start, size in iter_arrow_mappings(_MAPS.read_text(errors="replace")):
                _libc_madvise(start, size)


def _count_file_backed() -> int:
    """Resident bytes of files; 0 where the system does not tell them."""
    return int(_PAGES.read_text().split()[2]) * mmap.PAGESIZE if _PAGES.exists() else 0


def iter_arrow_mappings(maps: str) -> Iterator[tuple[int, int]]:
    """Yield address and bytes of each mapping of an Arrow file that this process can only read.

    A page that may be written can hold what no file has, so it is left alone.
    """
    for line in maps.splitlines():
        place, rights = line.split(maxsplit=2)[:2]
        if rights.startswith("r-") and line.endswith(".arrow"):
            begin, end = (int(address, 16) for address in place.split("-"))
            yield begin, end - begin


def _libc_madvise(start: int, size: int) -> None:
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_DONTNEED)
