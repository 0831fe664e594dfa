"""A refused request: one sentence as JSON for the sender, and one line in the audit log for the operator."""

import ipaddress
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from fedtune.tracking import Access

__all__ = ["AuditLog", "RequestRefusedError", "source_of"]

_LINES, _LINES_OF_ALL = 60, 600
"""The limits of lines per minute, for one source and for all. Further refusals are only counted, to save disk space."""
_NAMED = 10
"""The number of sources above the limit that get a line each. All others share one line."""
_MINUTE, _TOGETHER = 60.0, 3600.0
"""The period of the limits, and the time in which equal refusals share a line, in seconds."""
_WRITTEN_EVERY = 10.0
_REMEMBERED = 1024
"""The number of refusals that are remembered, to count their repetitions."""


class RequestRefusedError(Exception):
    """A request is refused. The sentence explains what is wrong and how to fix it."""

    def __init__(self, status: int, sentence: str, actor: str = "") -> None:
        super().__init__(sentence)
        self.status, self.message, self.actor = status, sentence, actor


@dataclass
class _Line:
    """A refusal in the log, and the number of its repetitions since then."""

    number: int
    begun: float
    written: float
    pending: int = 0


class AuditLog:
    """Writes the audit log. It is safe to use from several threads. ``clock`` returns seconds."""

    def __init__(self, access: Access, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._clock = access.audit, clock
        self._lock = Lock()
        self._minute, self._seen, self._written = 0, Counter[str](), Counter[str]()
        self._flushed = clock()
        self._recent: OrderedDict[tuple[str, str], _Line] = OrderedDict()

    def record_action(self, who: str, what: str) -> None:
        """Record a successful request of an operator or a device."""
        self._log.write_line("done", who, what)

    def record_refusal(self, address: str, what: str, who: str = "") -> None:
        """Record a refused request. ``who`` is the operator or the device, if it is known."""
        with self._lock:
            shown, source = f"{who} at {address}" if who else address, source_of(address)
            if self._counted((shown, what)) or not self._within_limits(source):
                return
            number, now = self._log.write_line("refused", shown, what, source), self._clock()
            self._recent[shown, what] = _Line(number, now, now)
            if len(self._recent) > _REMEMBERED:
                self._write(self._recent.popitem(last=False)[1])

    def flush(self, every: float = 0.0) -> None:
        """Write the counts of repetitions, and the refusals above the limits; at most once in ``every`` seconds."""
        with self._lock:
            if self._clock() - self._flushed >= every:
                self._flushed = self._clock()
                self._turn()
                for line in self._recent.values():
                    self._write(line)

    def _counted(self, refusal: tuple[str, str]) -> bool:
        """Whether an equal refusal was written recently. If so, the repetition is counted there."""
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
        """Start a new minute if the last one is over, and write its counts of refusals above the limits."""
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
    """Return the source of a refusal: the address, or with IPv6 its /64 network, which may be one machine."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return address
    mapped = found.ipv4_mapped
    return str(mapped) if mapped is not None else str(ipaddress.ip_network((found, 64), strict=False))
