"""Delay Ctrl-C while something must not be left half done."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["hold_interrupts", "start_without_interrupts"]


@contextmanager
def hold_interrupts() -> Iterator[None]:
    """Delay Ctrl-C until the end of the block. Python raises it in the main thread alone; others need no delay.

    Blocking the signal would not do: the system then gives it to another thread of the process, and Python raises
    KeyboardInterrupt in the main thread all the same.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    arrived: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: arrived.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if arrived:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def start_without_interrupts() -> Iterator[None]:
    """Delay Ctrl-C until the end of the block. Processes started inside ignore it and leave it to this process."""
    from multiprocessing import resource_tracker  # processes that read settings alone do not need it

    # It unblocks the signal when it starts its own process, so it must not do so inside the block.
    resource_tracker.ensure_running()
    with hold_interrupts():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
