"""How long to wait before trying again: longer each time up to a limit, and never at the same moment as others."""

import random

__all__ = ["Backoff", "choose_poll_delay"]

_LEAST, _MOST, _SHARE = 0.25, 2.0, 0.1


def choose_poll_delay(waited: float) -> float:
    """Seconds until the next look for an order, after ``waited`` seconds without one: a tenth of them, within limits.

    Each look costs the server a signature to check; looking four times a second, sixteen devices kept it busy.
    """
    return min(_MOST, max(_LEAST, _SHARE * waited))


class Backoff:
    """Seconds from ``first`` to ``most``, doubled each time, each drawn from the upper half of its range."""

    def __init__(self, first: float = 0.5, most: float = 20.0) -> None:
        self._first, self._most = first, most
        self._next = first

    def choose_delay(self) -> float:
        """The seconds to wait now."""
        seconds, self._next = self._next, min(self._most, self._next * 2)
        return seconds * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Begin again, after a success."""
        self._next = self._first
