"""Serving the page: the socket is opened first, so that a port in use is told before anything else."""

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from fedtune.errors import ServerError

__all__ = ["is_loopback", "make_page_url", "open_page_socket", "serve_page"]


@contextmanager
def open_page_socket(host: str, port: int) -> Iterator[socket.socket]:
    """Yield a listening socket; ServerError if the address is not available."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ServerError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port or --host"
        ) from error
    with listener:
        yield listener


def make_page_url(listener: socket.socket, host: str) -> str:
    """Return the address to open in a browser on this machine."""
    shown = "127.0.0.1" if host == "0.0.0.0" else "::1" if host == "::" else host
    port = listener.getsockname()[1]
    return f"http://[{shown}]:{port}/" if ":" in shown else f"http://{shown}:{port}/"


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches the host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve_page(app: ASGIApp, listener: socket.socket) -> None:
    """Serve until Ctrl-C."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        limit_concurrency=64,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=2,
    )
    uvicorn.Server(config).run(sockets=[listener])
