"""Limits on the connections to the gateway: their number per address and in total, and the time that each may take.

Without limits, a client that opens many connections and sends nothing, or sends slowly, would block all others. If
there are too many connections, the oldest one without a complete request is closed. An honest device sends one at once.
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
"""The address of the current connection. asyncio runs its callbacks in the context in which it was accepted."""
_REQUEST_SECONDS = 15.0
"""Seconds from the start of a connection, or the first byte of a later request, to the end of the headers."""
AT_A_TIME, _WAITING = 16, 1024
"""Connections accepted at a time, and connections that wait. Accepting a flood at once would close honest ones."""
_TOO_MANY = "too many connections"


@dataclass(eq=False)
class Connection:
    """One connection. It is closed with the reason ``why`` if nothing changes by ``due``; None means no limit."""

    socket: socket.socket
    address: str
    source: str
    due: float | None
    why: str
    proven: bool = False
    abort: Callable[[], None] | None = None
    """Closes the connection at once; set when there is a transport."""

    def wait(self, due: float | None, why: str = "") -> None:
        """Set a new time limit and its reason."""
        self.due, self.why = due, why


class Connections:
    """At most ``each`` connections per address and ``total`` in all.

    ``tell`` is called with the address of a closed connection and the reason. ``clock`` returns seconds. All methods
    must be called in the thread of the event loop.
    """

    def __init__(
        self, each: int, total: int, tell: Callable[[str, str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._each, self._total, self.tell, self.clock = each, total, tell, clock
        self._open: dict[int, Connection] = {}

    def admit(self, accepted: socket.socket, address: str) -> bool:
        """Add a new connection; return whether it is accepted.

        If there are too many, a connection without a complete request is closed for it.
        """
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
        """Return the connection with this file descriptor, or None."""
        return self._open.get(number)

    def release(self, number: int) -> None:
        """Remove a connection that was closed."""
        self._open.pop(number, None)

    def expect_request(self, connection: Connection) -> None:
        """Set the time limit for the headers of the next request."""
        connection.wait(self.clock() + _REQUEST_SECONDS, f"sent no complete request within {_REQUEST_SECONDS:.0f} s")

    def sweep(self) -> None:
        """Close all connections that exceeded their time limit. Must be called regularly."""
        now = self.clock()
        for connection in [one for one in self._open.values() if one.due is not None and one.due < now]:
            self.cut(connection, connection.why)

    def cut(self, connection: Connection, why: str) -> None:
        """Shut down a connection unless it is closed already. asyncio notices this and closes the socket."""
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
            self.cut(oldest, f"{_TOO_MANY}, and this one sent no complete request")
        return oldest is not None


class Listener(socket.socket):
    """A listening socket that counts its connections. asyncio accepts and closes them as usual."""

    connections: Connections

    def listen(self, backlog: int = 0) -> None:
        """Listen with a long queue. Few connections are accepted at a time, so that these make progress in between."""
        super().listen(max(backlog, _WAITING))

    def accept(self) -> tuple[socket.socket, tuple[str, int]]:
        """Return the next admitted connection and its address; raise BlockingIOError if none is waiting."""
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
