"""A network namespace whose only line to this machine drops packets, holds them up or is cut, as told. Needs root.

Two TUN devices, one of them in the namespace, and a thread that passes packets between them: what netem does, on
kernels that are built without it.
"""

import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["HERE", "BadLine", "bad_line"]

HERE, THERE = "10.231.7.1", "10.231.7.2"
_NAMESPACE = "fedtune-line"
_SET_INTERFACE, _TUN_WITHOUT_HEADER = 0x400454CA, 0x1001
_PACKET = 1 << 16


class BadLine:
    """``delay`` is in seconds each way, ``loss`` the share of packets dropped; both can be changed at any time."""

    def __init__(self) -> None:
        self.delay, self.loss, self.cut = 0.0, 0.0, False
        self.passed, self.dropped = 0, 0
        self._random = random.Random(0)
        self._ends = _tun("fedtune-near"), _tun("fedtune-far")
        self._waiting: list[tuple[float, int, int, bytes]] = []
        self._over = threading.Event()
        _ip("netns", "add", _NAMESPACE)
        _ip("link", "set", "fedtune-far", "netns", _NAMESPACE)
        _ip("addr", "add", f"{HERE}/24", "dev", "fedtune-near")
        _ip("link", "set", "fedtune-near", "up")
        _ip("-n", _NAMESPACE, "addr", "add", f"{THERE}/24", "dev", "fedtune-far")
        _ip("-n", _NAMESPACE, "link", "set", "fedtune-far", "up")
        _ip("-n", _NAMESPACE, "link", "set", "lo", "up")
        self._thread = threading.Thread(target=self._pass, daemon=True)
        self._thread.start()

    @property
    def inside(self) -> tuple[str, ...]:
        """What to put before a command that shall run at the far end."""
        return ("ip", "netns", "exec", _NAMESPACE)

    def close(self) -> None:
        """Take it all away."""
        self._over.set()
        self._thread.join()
        _ip("netns", "delete", _NAMESPACE)
        for end in self._ends:
            os.close(end)

    def _pass(self) -> None:
        near, far = self._ends
        while not self._over.is_set():
            due = self._waiting[0][0] - time.monotonic() if self._waiting else 0.2
            for end in select.select(self._ends, [], [], max(0.0, min(due, 0.2)))[0]:
                packet = os.read(end, _PACKET)
                if self.cut or self._random.random() < self.loss:
                    self.dropped += 1
                    continue
                self.passed += 1
                other = far if end == near else near
                heapq.heappush(self._waiting, (time.monotonic() + self.delay, self.passed, other, packet))
            while self._waiting and self._waiting[0][0] <= time.monotonic():
                with suppress(OSError):  # an end that is not up takes nothing
                    os.write(*self._waiting[0][2:])
                heapq.heappop(self._waiting)


@contextmanager
def bad_line() -> Iterator[BadLine]:
    """A line for as long as the block lasts; it is good until told otherwise."""
    line = BadLine()
    try:
        yield line
    finally:
        line.close()


def _tun(name: str) -> int:
    end = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(end, _SET_INTERFACE, struct.pack("16sH22x", name.encode(), _TUN_WITHOUT_HEADER))
    return end


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
