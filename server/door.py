"""The only way in: fleet paths for enrolled devices, fedtune's own paths, and a recorded refusal for all else."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from fedtune.errors import FedtuneError, ServerError
from fedtune.tracking.document import text
from server.enrolment import Enrolment
from server.forward import Forward, limited
from server.guard import Guard, address
from server.log_routes import log_routes
from server.logs import Logs
from server.operating import Operating
from server.refusal import Audit, RefusedError

__all__ = ["door"]

Endpoint = Callable[[Request], Awaitable[Response]]
Answer = Callable[[Request, Any], dict[str, Any]]
_BODY = 1 << 20


def door(
    guard: Guard,
    audit: Audit,
    forward: Forward,
    enrolment: Enrolment,
    operating: Operating,
    ca: str,
    healthy: Callable[[], bool],
    logs: Logs,
) -> Starlette:
    """The application that listens where others can reach it."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await forward.close()

    refuse = _refusing(audit)
    handlers = {RefusedError: refuse, HTTPException: refuse, FedtuneError: refuse}
    routes = [
        Route("/v1/fleet/{path:path}", forward.pass_on, methods=["POST"]),
        Route("/fedtune/ca", lambda _: PlainTextResponse(ca), methods=["GET"]),
        Route("/health", lambda _: _health(healthy()), methods=["GET"]),
        *log_routes(partial(_for_operators, guard), operating.store, logs),
        *_device_routes(enrolment),
        *_operator_routes(guard, operating),
    ]
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)


def _health(well: bool) -> Response:
    """For whoever watches the server, hence without a key and without a reason; the log tells more."""
    return _json({"status": "ok"} if well else {"status": "starting"}, 200 if well else 503)


def _device_routes(enrolment: Enrolment) -> list[Route]:
    return [
        Route("/fedtune/time", _answering(enrolment.time), methods=["GET"]),
        Route("/fedtune/enroll", _answering(enrolment.enroll), methods=["POST"]),
        Route("/fedtune/device/profile", _answering(enrolment.profile), methods=["POST"]),
    ]


def _operator_routes(guard: Guard, operating: Operating) -> list[Route]:
    def route(method: str, path: str, answer: Callable[[str, Request, Any], dict[str, Any]]) -> Route:
        return Route(f"/fedtune/{path}", _for_operators(guard, answer), methods=[method])

    return [
        route("POST", "runs", operating.submit),
        route("GET", "runs", operating.runs),
        route("GET", "runs/{run}", operating.run),
        route("POST", "runs/{run}/stop", operating.stop),
        route("POST", "runs/{run}/resume", operating.resume),
        route("POST", "runs/{run}/rollback", operating.rollback),
        route("GET", "devices", operating.devices),
        route("DELETE", "devices/{device}", operating.remove),
        route("POST", "devices/{device}/tags", operating.tag),
        route("POST", "devices/{device}/release", operating.release),
        route("POST", "tokens", operating.token),
        route("GET", "audit", operating.lines),
    ]


def _answering(answer: Answer) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        sent = await _sent(request)
        return _json(await run_in_threadpool(answer, request, sent))

    return endpoint


def _for_operators(guard: Guard, answer: Callable[[str, Request, Any], dict[str, Any]]) -> Endpoint:
    """The key is looked at before the body is read."""

    async def endpoint(request: Request) -> Response:
        who = await run_in_threadpool(guard.operator, request)
        sent = await _sent(request)
        return _json(await run_in_threadpool(answer, who, request, sent))

    return endpoint


async def _sent(request: Request) -> Any:
    """The JSON a request carries, or None."""
    body = b"".join([chunk async for chunk in limited(request, _BODY)])
    try:
        return json.loads(body) if body else None
    except ValueError as error:
        raise RefusedError(400, f"the body is not JSON ({error}); update fedtune") from error


def _refusing(audit: Audit) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def refuse(request: Request, error: Exception) -> Response:
        status, sentence = _told(request, error)
        if status < 500:
            who = getattr(error, "who", "")
            what = f"{request.method} {request.url.path[:200]}: {sentence}"
            await run_in_threadpool(audit.refused, f"{who} at {address(request)}" if who else address(request), what)
        return _json({"error": sentence}, status)

    return refuse


def _told(request: Request, error: Exception) -> tuple[int, str]:
    """Status and sentence of what was raised while a request was dealt with."""
    if isinstance(error, RefusedError):
        return error.status, error.sentence
    if isinstance(error, HTTPException):
        return error.status_code, f"there is nothing at {request.url.path[:200]} for {request.method}"
    return 503 if isinstance(error, ServerError) else 400, str(error)


def _json(content: Any, status: int = 200) -> Response:
    return Response(text(content), status, media_type="application/json")
