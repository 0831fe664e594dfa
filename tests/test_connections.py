"""How many connections there may be, and how long each may take for what."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from fedtune.server.gateway import http_line
from fedtune.server.gateway.connections import Connections, Listener
from fedtune.server.gateway.http_line import make_watched_protocol


class Told:
    """A listener on the loopback address whose connections go by a clock that is set, and what was told of them."""

    def __init__(self, each: int = 4, total: int = 8) -> None:
        self.now = 0.0
        self.lines: list[tuple[str, str]] = []
        self.connections = Connections(each, total, lambda *line: self.lines.append(line), lambda: self.now)
        made = socket.create_server(("127.0.0.1", 0))
        self.listener = Listener(made.family, made.type, made.proto, fileno=made.detach())
        self.listener.connections = self.connections
        self.listener.setblocking(False)
        self.port = self.listener.getsockname()[1]
        self.callers: list[socket.socket] = []
        self.accepted: list[socket.socket] = []

    def call(self, source: str = "127.0.0.1") -> socket.socket:
        caller = socket.create_connection(("127.0.0.1", self.port), source_address=(source, 0))
        self.callers.append(caller)
        end = time.monotonic() + 5
        while time.monotonic() < end:
            with suppress(BlockingIOError):
                self.accepted.append(self.listener.accept()[0])
                return caller
            if self.lines:
                return caller
            time.sleep(0.01)
        raise AssertionError("it was not accepted")

    def close(self) -> None:
        for one in [*self.callers, *self.accepted, self.listener]:
            one.close()


@pytest.fixture
def told() -> Iterator[Told]:
    made = Told()
    yield made
    made.close()


def is_cut(caller: socket.socket) -> bool:
    caller.settimeout(1.0)
    try:
        return caller.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True


def test_the_oldest_that_brought_nothing_makes_room_for_a_new_one_of_its_address(told: Told) -> None:
    first, second, *_ = [told.call() for _ in range(4)]
    told.connections.find(told.accepted[0].fileno()).proven = True  # type: ignore[union-attr]
    told.call()
    assert not is_cut(first)
    assert is_cut(second)
    assert told.lines == [("127.0.0.1", "too many connections, and this one sent no complete request")]


def test_one_address_that_uses_all_it_may_is_refused_more_and_another_is_not(told: Told) -> None:
    for _ in range(4):
        told.call()
    for one in told.accepted:
        told.connections.find(one.fileno()).proven = True  # type: ignore[union-attr]
    assert is_cut(told.call())
    assert told.lines == [("127.0.0.1", "too many connections from this address: 4")]
    told.lines.clear()
    assert not is_cut(told.call("127.0.0.2"))


def test_all_addresses_together_are_bounded_too(told: Told) -> None:
    callers = [told.call(f"127.0.0.{number}") for number in range(2, 10)]
    assert not any(map(is_cut, callers[:1]))
    told.call("127.0.0.10")
    assert is_cut(callers[0])
    assert not is_cut(callers[1])


def test_a_closed_connection_counts_no_more(told: Told) -> None:
    for _ in range(20):
        told.call()
        told.accepted.pop().close()
    assert told.lines == []


def test_what_is_overdue_is_cut_and_what_is_not_stays(told: Told) -> None:
    early = told.call()
    told.now = 10.0
    late = told.call()
    told.now = 15.5
    told.connections.sweep()
    assert is_cut(early)
    assert not is_cut(late)
    assert told.lines == [("127.0.0.1", "sent no complete request within 15 s")]


@contextmanager
def web(each: int = 50) -> Iterator[Told]:
    """uvicorn with a route that reads its body and one that refuses it, on such a listener."""
    told = Told(each, 100)

    async def read(request: Request) -> Response:
        return PlainTextResponse(str(len(await request.body())))

    async def refuse(_: Request) -> Response:
        return PlainTextResponse("no", 413)

    async def large(_: Request) -> Response:
        return PlainTextResponse(b"x" * (32 << 20))

    routes = [Route("/read", read, methods=["POST"]), Route("/refuse", refuse, methods=["POST"]), Route("/", large)]
    config = uvicorn.Config(
        Starlette(routes=routes),
        loop="asyncio",
        http=make_watched_protocol(told.connections),
        ws="none",
        log_config=None,
        access_log=False,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([told.listener],))
    thread.start()
    try:
        yield told
    finally:
        server.should_exit = True
        thread.join(10)
        for caller in told.callers:
            caller.close()


def dialled(told: Told) -> socket.socket:
    caller = socket.create_connection(("127.0.0.1", told.port))
    caller.settimeout(5)
    told.callers.append(caller)
    return caller


def answer(caller: socket.socket, end: bytes) -> bytes:
    """What comes until it ends in some bytes."""
    came = b""
    while not came.endswith(end):
        came += caller.recv(1000)
    return came


def until(told: Told, why: str) -> None:
    """Wait until a connection is waited for because of that."""
    end = time.monotonic() + 20
    while not any(one.why == why for one in list(told.connections._open.values())):
        assert time.monotonic() < end, "no connection is"
        time.sleep(0.05)


def sweep(told: Told, now: float) -> None:
    time.sleep(0.6)  # what was sent is dealt with by another thread
    told.now = now
    told.connections.sweep()


HEAD = b"POST /read HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n"


def test_headers_that_do_not_end_are_cut_also_after_a_whole_request() -> None:
    with web() as told:
        dribbling, second = dialled(told), dialled(told)
        dribbling.sendall(HEAD)
        second.sendall(HEAD + b"\r\n0123456789")
        assert b"200 OK" in answer(second, b"\r\n\r\n10")
        sweep(told, 100.0)
        assert is_cut(dribbling)
        assert not is_cut(second), "a rest between requests is uvicorn's to end"
        second.sendall(HEAD)
        sweep(told, 114.0)
        assert told.lines == [("127.0.0.1", "sent no complete request within 15 s")]
        sweep(told, 116.0)
        assert is_cut(second)


def test_a_body_has_to_get_on_and_a_slow_line_is_not_cut() -> None:
    with web() as told:
        stuck, slow = dialled(told), dialled(told)
        stuck.sendall(HEAD + b"\r\n01234")
        until(told, "sent its body too slowly")
        slow.sendall(HEAD.replace(b"10\r", b"60000\r") + b"\r\n" + b"x" * 50_000)
        sweep(told, 29.0)
        assert told.lines == []
        sweep(told, 31.0)
        assert told.lines == [("127.0.0.1", "sent its body too slowly")]
        assert is_cut(stuck)
        slow.sendall(b"x" * 10_000)
        assert b"200 OK" in answer(slow, b"\r\n\r\n60000")


def test_an_answer_that_is_not_read_is_cut() -> None:
    with web() as told:
        deaf = dialled(told)
        deaf.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        until(told, "did not read the response")
        sweep(told, 61.0)
        assert told.lines == [("127.0.0.1", "did not read the response")]


def taken(caller: socket.socket, most: int) -> int:
    """Bytes of a body that can be sent before the other side ends the line."""
    for sent in range(0, most, 1 << 16):
        try:
            caller.sendall(b"x" * (1 << 16))
        except (BrokenPipeError, ConnectionResetError):
            return sent
    return most


def test_a_body_that_was_refused_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_line, "_REFUSED_BYTES", 1 << 20)
    with web() as told:
        caller = dialled(told)
        caller.sendall(b"POST /refuse HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n")
        assert b"413" in answer(caller, b"no")
        assert taken(caller, 1_000_000_000) < 64 << 20
        assert told.lines == [("127.0.0.1", "continued to send a refused body")]


def test_what_is_no_http_is_told_with_its_address() -> None:
    with web() as told:
        for bad in (b"\x16\x03\x01 hello\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000):
            caller = dialled(told)
            caller.sendall(bad)
            assert b"400" in caller.recv(1000)
        assert [line for line, _ in zip(told.lines, range(2), strict=False)] == [
            ("127.0.0.1", "sent an invalid HTTP request, or headers that are too large")
        ] * 2


@pytest.mark.parametrize(
    ("behind", "why"),
    [(HEAD, "sent no complete request within 15 s"), (HEAD + b"\r\n01234", "sent its body too slowly")],
)
def test_a_request_that_comes_behind_another_has_to_get_on_too(behind: bytes, why: str) -> None:
    with web() as told:
        caller = dialled(told)
        caller.sendall(HEAD + b"\r\n0123456789" + behind)
        assert b"200 OK" in answer(caller, b"\r\n\r\n10")
        sweep(told, 31.0)
        assert told.lines == [("127.0.0.1", why)]
        assert is_cut(caller)


def test_a_caller_that_hangs_up_at_once_is_not_counted_for_long() -> None:
    with web(each=2) as told:
        for _ in range(5):
            socket.create_connection(("127.0.0.1", told.port)).close()
            time.sleep(0.1)
        patient = dialled(told)
        patient.sendall(HEAD + b"\r\n0123456789")
        assert b"200 OK" in answer(patient, b"\r\n\r\n10")
        assert told.lines == []
