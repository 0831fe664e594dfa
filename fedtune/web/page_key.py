"""A key for a page that other machines reach: whoever opens the address with it gets a cookie and sees the runs."""

import secrets
from typing import Final

from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["KEY_COOKIE", "PageKey", "make_page_key"]

KEY_COOKIE: Final = "fedtune-page-key"
_UNKNOWN = "This page needs its key; open the whole address that fedtune ui printed.\n"


def make_page_key() -> str:
    """Draw a key of 192 random bits. A page that is started again has another one."""
    return secrets.token_urlsafe(24)


class PageKey:
    """Answers only requests that have the key in their cookie, and gives the cookie for ``?key=KEY``."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        chosen = self._app if scope["type"] != "http" else self._choose(Request(scope))
        await chosen(scope, receive, send)

    def _choose(self, request: Request) -> ASGIApp:
        if self._is_key(request.cookies.get(KEY_COOKIE, "")):
            return self._app
        return self._greet() if self._is_key(request.query_params.get("key", "")) else PlainTextResponse(_UNKNOWN, 401)

    def _is_key(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self._key.encode())

    def _greet(self) -> Response:
        """Go on without the key in the address, so that it does not stay in the browser's history."""
        response = RedirectResponse("/runs", 303)
        response.set_cookie(KEY_COOKIE, self._key, httponly=True, samesite="strict")
        return response
