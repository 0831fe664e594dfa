"""Random, exponentially growing delays between retries, up to a limit."""

import random

__all__ = ["Backoff", "choose_poll_delay"]

_LEAST, _MOST, _SHARE = 0.25, 2.0, 0.1


def choose_poll_delay(waited: float) -> float:
    """Return the seconds until the next poll for a train request: a tenth of ``waited``, within limits.

    ``waited`` is the number of seconds since the last request. The server checks a signature for each poll. Sixteen
    devices that polled four times a second kept it busy.
    """
    return min(_MOST, max(_LEAST, _SHARE * waited))


class Backoff:
    """Delays that double from ``first`` to ``most`` seconds. Each is drawn between half of this value and all of it."""

    def __init__(self, first: float = 0.5, most: float = 20.0) -> None:
        self._first, self._most = first, most
        self._next = first

    def choose_delay(self) -> float:
        """Return the seconds to wait before the next attempt."""
        seconds, self._next = self._next, min(self._most, self._next * 2)
        return seconds * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Start again with the first delay. Called after a success."""
        self._next = self._first
