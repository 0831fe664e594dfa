"""The server's time on a device whose own clock may be wrong, or jump."""

import time
from collections.abc import Callable

__all__ = ["ServerClock"]


class ServerClock:
    """Seconds since 1970 on the server, as ``ask`` last told them."""

    def __init__(self, ask: Callable[[], float]) -> None:
        self._ask = ask
        self._ahead = time.time() - time.monotonic()

    def synchronise(self) -> None:
        """Ask anew; raises what asking raises."""
        before = time.monotonic()
        told = self._ask()
        self._ahead = told - (before + time.monotonic()) / 2

    def get_server_time(self) -> float:
        """The server's time now."""
        return time.monotonic() + self._ahead
