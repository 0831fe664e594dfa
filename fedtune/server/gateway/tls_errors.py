"""Failed TLS connections, which no web framework tells of: plain HTTP, old protocols, an authority nobody trusts."""

import ssl
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["make_reporting_ssl_class", "small_buffers"]

_BUFFER = 1 << 16


def small_buffers() -> None:
    """Let each TLS connection hold a buffer of 64 KiB, where asyncio gives it 256: thousands may be open at a time."""
    SSLProtocol.max_size = _BUFFER


def make_reporting_ssl_class(tell: Callable[[ssl.SSLError], None]) -> type[ssl.SSLObject]:
    """A class for ``SSLContext.sslobject_class`` that passes on errors of a handshake, or of the alert after it."""

    @contextmanager
    def told() -> Iterator[None]:
        try:
            yield
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
            raise
        except ssl.SSLError as error:
            tell(error)
            raise

    class Telling(ssl.SSLObject):
        def do_handshake(self) -> None:
            with told():
                super().do_handshake()

        def read(self, *args: Any) -> Any:
            with told():
                return super().read(*args)

    return Telling
