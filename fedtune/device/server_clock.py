"""The server's time on a device whose own clock may be wrong or may jump."""

import time
from collections.abc import Callable

__all__ = ["ServerClock"]


class ServerClock:
    """The server's time in seconds since 1970, computed from the last result of ``ask`` and a monotonic clock."""

    def __init__(self, ask: Callable[[], float]) -> None:
        self._ask = ask
        self._ahead = time.time() - time.monotonic()

    def synchronise(self) -> None:
        """Ask the server for its time. Errors of ``ask`` are raised."""
        before = time.monotonic()
        told = self._ask()
        self._ahead = told - (before + time.monotonic()) / 2

    def get_server_time(self) -> float:
        """Return the server's time now."""
        return time.monotonic() + self._ahead
