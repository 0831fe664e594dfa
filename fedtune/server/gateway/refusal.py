"""A request that is turned down: one JSON sentence for whoever sent it, one line in the audit for the operator."""

import ipaddress
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from fedtune.tracking import Access

__all__ = ["AuditLog", "RequestRefusedError", "source_of"]

_LINES, _LINES_OF_ALL = 60, 600
"""Lines a minute that one source may fill, and all of them; more are counted, so that nobody fills the disk."""
_NAMED = 10
"""Sources whose count is told, of those that sent more than that; the others are told in one line."""
_MINUTE, _TOGETHER = 60.0, 3600.0
"""Seconds within which lines are counted, and within which the same refusal is one line."""
_WRITTEN_EVERY = 10.0
_REMEMBERED = 1024
"""Refusals that are remembered, to be counted when they come again."""


class RequestRefusedError(Exception):
    """Raised where a request is turned down; the sentence says what is wrong and the mend."""

    def __init__(self, status: int, sentence: str, actor: str = "") -> None:
        super().__init__(sentence)
        self.status, self.message, self.actor = status, sentence, actor


@dataclass
class _Line:
    """A refusal that was written down, and how often it came again since that was."""

    number: int
    begun: float
    written: float
    pending: int = 0


class AuditLog:
    """Writes the audit, for many threads at once; ``clock`` gives seconds."""

    def __init__(self, access: Access, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._clock = access.audit, clock
        self._lock = Lock()
        self._minute, self._seen, self._written = 0, Counter[str](), Counter[str]()
        self._flushed = clock()
        self._recent: OrderedDict[tuple[str, str], _Line] = OrderedDict()

    def record_action(self, who: str, what: str) -> None:
        """Something an operator or a device was allowed to do."""
        self._log.write_line("done", who, what)

    def record_refusal(self, address: str, what: str, who: str = "") -> None:
        """Something that was turned down; ``who`` is the operator or the device that was known, if one was."""
        with self._lock:
            shown, source = f"{who} at {address}" if who else address, source_of(address)
            if self._counted((shown, what)) or not self._within_limits(source):
                return
            number, now = self._log.write_line("refused", shown, what, source), self._clock()
            self._recent[shown, what] = _Line(number, now, now)
            if len(self._recent) > _REMEMBERED:
                self._write(self._recent.popitem(last=False)[1])

    def flush(self, every: float = 0.0) -> None:
        """Write down what was counted, and what the last minute left out; once in ``every`` seconds."""
        with self._lock:
            if self._clock() - self._flushed >= every:
                self._flushed = self._clock()
                self._turn()
                for line in self._recent.values():
                    self._write(line)

    def _counted(self, refusal: tuple[str, str]) -> bool:
        """Whether the same was written down of late; then it is counted there."""
        line, now = self._recent.get(refusal), self._clock()
        if line is None or now - line.begun > _TOGETHER:
            return False
        line.pending += 1
        if now - line.written > _WRITTEN_EVERY:
            self._write(line)
        return True

    def _write(self, line: _Line) -> None:
        if line.pending:
            self._log.count_repeats(line.number, line.pending)
        line.pending, line.written = 0, self._clock()

    def _within_limits(self, source: str) -> bool:
        self._turn()
        self._seen[source] += 1
        if self._written[source] >= _LINES or self._written.total() >= _LINES_OF_ALL:
            return False
        self._written[source] += 1
        return True

    def _turn(self) -> None:
        """Begin a new minute when it has come, and tell what was left out of the last one."""
        minute = int(self._clock() // _MINUTE)
        if minute == self._minute:
            return
        beyond = (self._seen - self._written).most_common()
        self._minute, self._seen, self._written = minute, Counter(), Counter()
        for source, count in beyond[:_NAMED]:
            self._log.write_line("refused", source, f"{count} more requests within a minute", source)
        if others := beyond[_NAMED:]:
            count = sum(more for _, more in others)
            self._log.write_line(
                "refused", "many", f"{count} more requests from {len(others)} others within a minute", "many"
            )


def source_of(address: str) -> str:
    """What a refusal is blamed on: an address, or with IPv6 the /64 network, of which one machine has every address."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return address
    mapped = found.ipv4_mapped
    return str(mapped) if mapped is not None else str(ipaddress.ip_network((found, 64), strict=False))
