"""A hard limit on the private memory that this process may take.

RLIMIT_DATA counts private memory that may be written, whether it is resident or not: also stacks of threads, and
weights that are mapped from a file. So the limit is what is mapped when it is set, plus what the process may still
take. A request above it fails, and torch raises an error that the process survives. RLIMIT_AS would count every
library.
"""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fedtune.memory.process_memory import read_mapped_bytes

__all__ = ["can_limit_memory", "limit_private_memory"]

_STACKS = 16 << 20
"""Two stacks of threads of 8 MB, of which a few pages become resident."""


def can_limit_memory() -> bool:
    """Return whether the system limits the private memory of a process. Linux does."""
    return sys.platform == "linux" and read_mapped_bytes() is not None


@contextmanager
def limit_private_memory(room: int) -> Iterator[None]:
    """Let this process take at most ``room`` bytes of private memory more in the block. Limits that are lower hold.

    Nothing is limited on a system that cannot.
    """
    mapped = read_mapped_bytes()
    if mapped is None or sys.platform != "linux":
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [
        min(mapped + max(0, room) + _STACKS, sys.maxsize),
        *(one for one in before if one != resource.RLIM_INFINITY),
    ]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
