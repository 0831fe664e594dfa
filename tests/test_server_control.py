"""The line to the SuperLink, which hangs up on lines it has not heard of for a while."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from flwr.proto.control_pb2 import StopRunRequest
from flwr.supercore.protobuf.client import ProtobufRequestContext

from fedtune.flower.control_client import RetryOnceInterceptor


@contextmanager
def hanging_up(times: int) -> Iterator[str]:
    """The address of a server that hangs up on its first callers and answers the next one."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for call in range(2):
                caller, _ = listener.accept()
                with caller:
                    caller.recv(1 << 16)
                    if call == times:
                        caller.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ndone")

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def call(address: str) -> str:
    context = ProtobufRequestContext("call", StopRunRequest(), httpx.Request("POST", address))
    with httpx.Client() as client:
        return RetryOnceInterceptor().intercept(context, lambda made: client.send(made.request)).text


def test_a_call_the_superlink_hung_up_on_is_made_once_more() -> None:
    with hanging_up(1) as address:
        assert call(address) == "done"


def test_a_superlink_that_always_hangs_up_is_not_called_for_ever() -> None:
    with hanging_up(2) as address, pytest.raises(httpx.RemoteProtocolError):
        call(address)
