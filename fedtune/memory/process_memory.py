"""Read and reset the peak resident memory of this process.

The peak never falls by itself, so measure each case in its own process.
"""

import resource
import sys
from pathlib import Path

__all__ = ["peak_rss", "reset_peak_rss"]

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def reset_peak_rss() -> None:
    """Reset the peak resident memory of this process, if the system supports it (Linux)."""
    if _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")


def peak_rss() -> int:
    """Return the peak resident memory in bytes since the last reset, or since the process started."""
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    marks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return marks[0] if marks else _peak_since_start()  # some kernels and sandboxes omit the line


def _peak_since_start() -> int:
    """Return the peak from ``getrusage`` in bytes. The system reports bytes on macOS and kilobytes elsewhere."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
