"""HTTP on a connection that is watched: headers, bodies and the reading of answers each have to get on.

uvicorn limits the size of headers and the rest between requests, but not how long a request may take to arrive.
"""

import asyncio
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from fedtune.server.gateway.connections import Connection, Connections

__all__ = ["make_watched_protocol"]

_BODY_SECONDS, _BYTES_A_SECOND = 30.0, 1000.0
"""A body may take so long, and longer the more of it has come: that fast at least, on the whole."""
_OURS_SECONDS = 60.0
"""While this server has not yet taken what came, or the other side what it was sent."""
_REFUSED_SECONDS, _REFUSED_BYTES = 5.0, 4 << 20
"""What is still read of a body after its answer: who sends it all before reading would else never see the answer."""


class _Watched(H11Protocol):
    """Tells the connections what each of them is to be waited for."""

    lines: ClassVar[Connections]
    _line: Connection | None = None
    _cycle: RequestResponseCycle | None = None
    _begun, _received = 0.0, 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._line = self.lines.find(transport.get_extra_info("socket").fileno())
        if self._line is not None:
            self._line.abort = transport.abort

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look(len(data))

    def _look(self, came: int) -> None:
        """See what is to be waited for now that so many bytes came, or that something of ours was done."""
        if self._line is None or self.flow.write_paused or self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            self._between_requests(self._line, came)
        else:
            self._in_a_request(self._line, self.cycle, came)

    def _between_requests(self, line: Connection, came: int) -> None:
        if self.conn.their_state is h11.SEND_BODY:
            self._received += came
            if self._received > _REFUSED_BYTES:
                self.lines.cut(line, "went on sending a body that was refused")
        elif not self.conn.trailing_data[0]:
            if line.proven:
                line.wait(None)
        elif line.due is None:
            self.lines.expect_request(line)

    def _in_a_request(self, line: Connection, cycle: RequestResponseCycle, came: int) -> None:
        now, line.proven = self.lines.clock(), True
        if self._cycle is not cycle:
            self._cycle, self._begun, self._received = cycle, now, 0
        self._received += came
        due = self._begun + _BODY_SECONDS + self._received / _BYTES_A_SECOND
        if self.flow.read_paused:
            due = max(due, now + _OURS_SECONDS)
        line.wait(due if cycle.more_body else None, "sent its body too slowly")

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._line is not None:
            self._line.wait(self.lines.clock() + _OURS_SECONDS, "did not read its answer")

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._line is not None:
            self._line.wait(None)
        self._look(0)

    def on_response_complete(self) -> None:
        if self._line is not None and not self.flow.write_paused:
            refused = self.conn.their_state is h11.SEND_BODY
            due = self.lines.clock() + _REFUSED_SECONDS if refused else None
            self._line.wait(due, "went on sending a body that was refused")
            self._received = 0
        super().on_response_complete()  # the next request may have begun to come behind the last one
        self._look(0)

    def send_400_response(self, msg: str) -> None:
        if self._line is not None:
            self.lines.tell(self._line.address, "sent something that is no HTTP request, or headers too large")
        super().send_400_response(msg)


def make_watched_protocol(connections: Connections) -> type[H11Protocol]:
    """A protocol for uvicorn, whose connections are those."""
    return type("Watched", (_Watched,), {"lines": connections})
