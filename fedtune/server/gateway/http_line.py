"""HTTP with time limits on headers, bodies and responses.

uvicorn limits the size of headers and the time between requests, but not the time of a request.
"""

import asyncio
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from fedtune.server.gateway.connections import Connection, Connections

__all__ = ["make_watched_protocol"]

_BODY_SECONDS, _BYTES_A_SECOND = 30.0, 1000.0
"""A body may take so many seconds, plus the time of its received bytes at this minimum rate."""
_OURS_SECONDS = 60.0
"""The time limit while this server has not read received bytes, or the client has not read the response."""
_REFUSED_SECONDS, _REFUSED_BYTES = 5.0, 4 << 20
"""Limits for reading a body after its response. Clients that send all before they read would miss the response."""


class _Watched(H11Protocol):
    """Sets the time limit of each connection."""

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
        """Set the time limit after ``came`` bytes were received, or after this server made progress."""
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
                self.lines.cut(line, "continued to send a refused body")
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
            self._line.wait(self.lines.clock() + _OURS_SECONDS, "did not read the response")

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._line is not None:
            self._line.wait(None)
        self._look(0)

    def on_response_complete(self) -> None:
        if self._line is not None and not self.flow.write_paused:
            refused = self.conn.their_state is h11.SEND_BODY
            due = self.lines.clock() + _REFUSED_SECONDS if refused else None
            self._line.wait(due, "continued to send a refused body")
            self._received = 0
        super().on_response_complete()  # the next request may have started to arrive
        self._look(0)

    def send_400_response(self, msg: str) -> None:
        if self._line is not None:
            self.lines.tell(self._line.address, "sent an invalid HTTP request, or headers that are too large")
        super().send_400_response(msg)


def make_watched_protocol(connections: Connections) -> type[H11Protocol]:
    """Return a protocol class for uvicorn that sets the time limits of these connections."""
    return type("Watched", (_Watched,), {"lines": connections})
