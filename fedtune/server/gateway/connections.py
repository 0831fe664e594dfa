"""Connections to the door: how many there may be, from one address and in all, and how long each may take.

Whoever opens connections and says nothing on them, or dribbles, would otherwise keep everybody else out. Where there
are too many, the oldest goes that never brought a whole request: an honest device brings one at once.
"""

import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass

from fedtune.server.gateway.refusal import source_of

__all__ = ["AT_A_TIME", "Connection", "Connections", "Listener", "peer"]

peer: ContextVar[str] = ContextVar("peer", default="unknown")
"""The address of the connection at hand: asyncio calls whatever is about it in the context it was taken in."""
_REQUEST_SECONDS = 15.0
"""From the beginning of a connection, or the first byte of a later request, to the end of a request's headers."""
AT_A_TIME, _WAITING = 16, 1024
"""Connections accepted at a time, and those that wait: a flood taken in at once would push out whoever is among it."""
_TOO_MANY = "too many connections"


@dataclass(eq=False)
class Connection:
    """One connection; unless it is further by ``due``, it is cut, since it has done ``why``. None means no limit."""

    socket: socket.socket
    address: str
    source: str
    due: float | None
    why: str
    proven: bool = False
    abort: Callable[[], None] | None = None
    """Ends it at once, once there is a transport that may be asked to."""

    def wait(self, due: float | None, why: str = "") -> None:
        """Wait for something else from now on."""
        self.due, self.why = due, why


class Connections:
    """At most ``each`` of one address and ``total`` in all; ``tell`` hears of an address and why it was cut off.

    For one thread, which is that of the event loop; ``clock`` gives seconds.
    """

    def __init__(
        self, each: int, total: int, tell: Callable[[str, str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._each, self._total, self.tell, self.clock = each, total, tell, clock
        self._open: dict[int, Connection] = {}

    def admit(self, accepted: socket.socket, address: str) -> bool:
        """Count a new connection, in place of one that has brought nothing where there are too many; or refuse it."""
        source = source_of(address)
        its = [one for one in self._open.values() if one.source == source]
        if len(its) >= self._each and not self._make_room(its):
            self.tell(address, f"{_TOO_MANY} from this address: {len(its)}")
            return False
        if len(self._open) >= self._total and not self._make_room(self._open.values()):
            self.tell(address, f"{_TOO_MANY}: {self._total}")
            return False
        made = Connection(accepted, address, source, None, "")
        self.expect_request(made)
        self._open[accepted.fileno()] = made
        return True

    def find(self, number: int) -> Connection | None:
        """The connection with this file descriptor."""
        return self._open.get(number)

    def release(self, number: int) -> None:
        """A connection is closed."""
        self._open.pop(number, None)

    def expect_request(self, connection: Connection) -> None:
        """The headers of a request have to be whole soon."""
        connection.wait(self.clock() + _REQUEST_SECONDS, f"sent no whole request within {_REQUEST_SECONDS:.0f} s")

    def sweep(self) -> None:
        """Cut what is overdue; to be called every moment."""
        now = self.clock()
        for connection in [one for one in self._open.values() if one.due is not None and one.due < now]:
            self.cut(connection, connection.why)

    def cut(self, connection: Connection, why: str) -> None:
        """End a connection, unless it has ended; asyncio finds out, and closes the socket."""
        if self._open.get(connection.socket.fileno()) is not connection:
            return
        del self._open[connection.socket.fileno()]
        self.tell(connection.address, why)
        if connection.abort is not None:
            connection.abort()
            return
        with suppress(OSError):
            connection.socket.shutdown(socket.SHUT_RDWR)

    def _make_room(self, among: Iterable[Connection]) -> bool:
        oldest = next((one for one in among if not one.proven), None)
        if oldest is not None:
            self.cut(oldest, f"{_TOO_MANY}, of which this one had brought nothing")
        return oldest is not None


class Listener(socket.socket):
    """A listening socket whose connections are counted; asyncio accepts and closes them as it does others."""

    connections: Connections

    def listen(self, backlog: int = 0) -> None:
        """Let many callers wait, however few are accepted at a time: those accepted get on between two times."""
        super().listen(max(backlog, _WAITING))

    def accept(self) -> tuple[socket.socket, tuple[str, int]]:
        """The next connection that is admitted, and its address; BlockingIOError when there is none."""
        while True:
            accepted, address = super().accept()
            counted = _Counted(self.connections, accepted)
            if self.connections.admit(counted, address[0]):
                peer.set(address[0])
                return counted, address
            counted.close()


class _Counted(socket.socket):
    def __init__(self, connections: Connections, accepted: socket.socket) -> None:
        super().__init__(accepted.family, accepted.type, accepted.proto, fileno=accepted.detach())
        self._connections = connections

    def close(self) -> None:
        if self.fileno() >= 0:
            self._connections.release(self.fileno())
        super().close()
