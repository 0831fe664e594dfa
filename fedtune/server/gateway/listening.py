"""The gateway's listening socket, its HTTP protocol, and its limits of files and connections."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette

from fedtune.errors import ServerError
from fedtune.file_limit import raise_file_limit
from fedtune.server.gateway.connections import AT_A_TIME, Connections, Listener, peer
from fedtune.server.gateway.http_line import make_watched_protocol
from fedtune.server.gateway.refusal import AuditLog
from fedtune.server.gateway.tls_errors import make_reporting_ssl_class
from fedtune.server.server_home import ServerHome

__all__ = ["config_of", "connections_of", "open_listening_socket"]

_OWN_FILES = 256
"""The requested limit of open files, and the number of files that are not connections."""
_MOST_CONNECTIONS = 2048
"""The largest number of connections. A TLS connection needs about 100 kB."""
_REST_SECONDS = 75


@contextmanager
def open_listening_socket(place: ServerHome) -> Iterator[Listener]:
    """Yield the listening socket; raise ServerError if the address is not available."""
    host, port = place.settings.address
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        made = socket.create_server((host, port), family=family)
        listener = Listener(made.family, made.type, made.proto, fileno=made.detach())
    except OSError as error:
        raise ServerError(f"cannot listen on {host}:{port}: {error.strerror}; change listen in server.yaml") from error
    with listener:
        yield listener


def connections_of(place: ServerHome, audit: AuditLog) -> Connections:
    """Return limits from the settings and the system. Each connection needs a second one to the SuperLink."""
    total = min(_MOST_CONNECTIONS, (raise_file_limit() - _OWN_FILES) // 2)
    return Connections(place.settings.connections, total, _in_background(audit))


def config_of(app: Starlette, place: ServerHome, audit: AuditLog, connections: Connections) -> uvicorn.Config:
    """Return uvicorn's configuration. Failed TLS connections are written to the audit log with their address."""
    config = uvicorn.Config(
        app,
        loop="asyncio",  # its transports close the counted sockets themselves
        http=make_watched_protocol(connections),
        backlog=AT_A_TIME,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_keep_alive=_REST_SECONDS,
        timeout_graceful_shutdown=3,
        ssl_certfile=str(place.certificate_file),
        ssl_keyfile=str(place.key_file),
    )
    config.load()
    assert config.ssl is not None
    tell = _in_background(audit)
    config.ssl.sslobject_class = make_reporting_ssl_class(
        lambda error: tell(peer.get(), f"the TLS connection failed: {error.reason or error}")
    )
    return config


def _in_background(audit: AuditLog) -> Callable[[str, str], None]:
    """Return a function that writes to the audit log in another thread, because the event loop must not block."""

    def tell(address: str, sentence: str) -> None:
        asyncio.get_running_loop().run_in_executor(None, audit.record_refusal, address, sentence)

    return tell
