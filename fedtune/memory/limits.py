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

_USUAL_STACK = 8 << 20


def can_limit_memory() -> bool:
    """Return whether the system limits the private memory of a process. Linux does."""
    return sys.platform == "linux" and read_mapped_bytes() is not None


@contextmanager
def limit_private_memory(room: int, threads: int = 1) -> Iterator[None]:
    """Let this process take at most ``room`` bytes of private memory more in the block. Limits that are lower hold.

    The stacks of ``threads`` and of one more may be added, of which a few pages become resident: OpenMP ends the
    process if it cannot start a thread. Nothing is limited on a system that cannot.
    """
    mapped = read_mapped_bytes()
    if mapped is None or sys.platform != "linux":
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = mapped + max(0, room) + (threads + 1) * _read_stack_size()
    limits = [min(wanted, sys.maxsize), *(one for one in before if one != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _read_stack_size() -> int:
    soft = resource.getrlimit(resource.RLIMIT_STACK)[0]
    return _USUAL_STACK if soft == resource.RLIM_INFINITY else soft
