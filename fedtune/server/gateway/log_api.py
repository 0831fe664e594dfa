"""The logs for operators: of the server, and of the process that coordinates a run."""

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fedtune.logs import Logs
from fedtune.server.gateway.refusal import RequestRefusedError
from fedtune.tracking import Store

__all__ = ["log_routes"]

Endpoint = Callable[[Request], Awaitable[Response]]
LogHandler = Callable[[str, Request, Any], dict[str, Any]]
_LINES, _MOST_LINES = 200, 5000


def log_routes(for_operators: Callable[[LogHandler], Endpoint], store: Store, logs: Logs) -> list[Route]:
    """Return the routes. ``for_operators`` wraps a handler so that only operators can call it."""

    def of_server(who: str, request: Request, _: Any) -> dict[str, Any]:
        return {"lines": logs.server(_count(who, request))}

    def of_run(who: str, request: Request, _: Any) -> dict[str, Any]:
        run = store.run(request.path_params["run"]).id
        return {"run": run, "lines": logs.run(run, _count(who, request))}

    return [
        Route("/fedtune/logs", for_operators(of_server), methods=["GET"]),
        Route("/fedtune/runs/{run}/logs", for_operators(of_run), methods=["GET"]),
    ]


def _count(who: str, request: Request) -> int:
    text = request.query_params.get("lines", str(_LINES))
    if not (text.isascii() and text.isdecimal() and len(text) < 6 and 0 < int(text) <= _MOST_LINES):
        raise RequestRefusedError(400, f"lines must be a whole number from 1 to {_MOST_LINES}", who)
    return int(text)
