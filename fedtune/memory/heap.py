"""What the allocator holds on to after tensors are freed."""

import ctypes
import sys
from functools import cache

__all__ = ["release_freed"]


def release_freed() -> None:
    """Give freed memory back to the system where the C library can (glibc); elsewhere nothing happens.

    glibc keeps freed blocks of up to 32 MB for later use, where blocks of other sizes do not fit in. Before a peak
    that costs as much memory as the model.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> "ctypes._NamedFuncPointer | None":
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
