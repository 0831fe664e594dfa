"""What every request and response of the page must satisfy, whichever page it is.

A web site that the user visits could point a name of its own to 127.0.0.1 and then read the page (DNS rebinding). Such
a request has that name in its Host header, so only addresses, ``localhost`` and the name of ``--host`` are accepted.
"""

import ipaddress
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["SECURITY_HEADERS", "RequestGuard", "is_known_host"]

SECURITY_HEADERS: Final = {
    "content-security-policy": (
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""Sent with every response. Scripts and styles come from the page's own files; none stands inside a page."""
_METHODS = ("GET", "HEAD")


class RequestGuard:
    """Refuses other methods than GET and HEAD and unknown hosts, and adds the security headers."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app, self._host = app, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        chosen = self._refuse(scope) or self._app
        await chosen(scope, receive, send_with_headers)

    def _refuse(self, scope: Scope) -> ASGIApp | None:
        """Return the refusal of a request; None if it may pass."""
        if scope["method"] not in _METHODS:
            return PlainTextResponse("The page only shows runs; it answers GET.\n", 405, {"allow": "GET, HEAD"})
        if not is_known_host(Headers(scope=scope).get("host", ""), self._host):
            return PlainTextResponse("This address is not the page's; open the one that fedtune ui printed.\n", 421)
        return None


def is_known_host(header: str, own: str) -> bool:
    """Return whether a Host header names an address, ``localhost``, or the host that the page was started with."""
    name = _split_port(header).lower().rstrip(".")
    return name in ("localhost", own.lower()) or _is_address(name)


def _split_port(header: str) -> str:
    """Return the host of ``host:port``; an IPv6 address is in brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
