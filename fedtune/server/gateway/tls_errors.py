"""Report failed TLS connections, which web frameworks ignore: plain HTTP, old protocols, an untrusted CA."""

import ssl
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["make_reporting_ssl_class", "small_buffers"]

_BUFFER = 1 << 16


def small_buffers() -> None:
    """Use a buffer of 64 KiB per TLS connection instead of asyncio's 256 KiB, because thousands may be open."""
    SSLProtocol.max_size = _BUFFER


def make_reporting_ssl_class(tell: Callable[[ssl.SSLError], None]) -> type[ssl.SSLObject]:
    """Return a class for ``SSLContext.sslobject_class`` that reports errors of a handshake or of a later alert."""

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
