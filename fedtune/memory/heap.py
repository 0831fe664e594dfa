"""What the C library does with freed memory: glibc gives the end of its heap back to the system again and again.

A merge takes and frees a few blocks of a megabyte for each piece of a tensor. By default each of them is given back
when it is freed and cleared page by page when it is taken again, a fifth of a linear merge's processor time.
"""

import ctypes
import os

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory(count: int = 1 << 25) -> bool:
    """Let this process keep up to ``count`` freed bytes, for the rest of its life; whether anything was changed.

    Nothing is where the C library has no such setting, or where the user set it by the environment.
    """
    if any(name in os.environ for name in _VARIABLES):
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(set_option(_TRIM_THRESHOLD, count)) and bool(set_option(_MMAP_THRESHOLD, count // 2))
