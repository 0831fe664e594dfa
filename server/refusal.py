"""A request that is turned down: one JSON sentence for whoever sent it, one line in the audit for the operator."""

import time
from collections import Counter
from threading import Lock

from fedtune.tracking import Access

__all__ = ["Audit", "RefusedError"]

_LINES = 60
"""Lines a minute that one address may fill; more are counted, so that nobody fills the disk by knocking."""


class RefusedError(Exception):
    """Raised where a request is turned down; the sentence says what is wrong and the mend."""

    def __init__(self, status: int, sentence: str, who: str = "") -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.who = status, sentence, who


class Audit:
    """Writes the audit, for many threads at once."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._lock = Lock()
        self._minute, self._lines = 0, Counter[str]()

    def done(self, who: str, what: str) -> None:
        """Something an operator or a device was allowed to do."""
        self._access.note("done", who, what)

    def refused(self, who: str, what: str) -> None:
        """Something that was turned down."""
        if self._within_limits(who):
            self._access.note("refused", who, what)

    def _within_limits(self, who: str) -> bool:
        minute = int(time.monotonic() // 60)
        with self._lock:
            if minute != self._minute:
                beyond = {known: count - _LINES for known, count in self._lines.items() if count > _LINES}
                self._minute, self._lines = minute, Counter()
            else:
                beyond = {}
            self._lines[who] += 1
            allowed = self._lines[who] <= _LINES
        for known, count in beyond.items():
            self._access.note("refused", known, f"{count} more requests within a minute")
        return allowed
