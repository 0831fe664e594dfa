"""The only way in: fleet paths for enrolled devices, fedtune's own paths, and a recorded refusal for all else."""

import asyncio
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
from fedtune.logs import Logs
from fedtune.server.gateway.access_api import LettingIn
from fedtune.server.gateway.authentication import Authenticator, get_remote_address
from fedtune.server.gateway.device_api import DeviceApi
from fedtune.server.gateway.log_api import log_routes
from fedtune.server.gateway.operator_api import OperatorApi
from fedtune.server.gateway.refusal import AuditLog, RequestRefusedError
from fedtune.server.gateway.reverse_proxy import ReverseProxy, stream_limited_body
from fedtune.server.operator_files import Role
from fedtune.server.sent import read_json
from fedtune.tracking.run_json import json_text
from fedtune.untrusted import clean_text

__all__ = ["make_gateway"]

Endpoint = Callable[[Request], Awaitable[Response]]
JsonHandler = Callable[[Request, Any], dict[str, Any]]
_BODY = 1 << 20
_SENTENCE = 2000
_STARTING = 503
"""What is told while the server itself is not ready; nothing was refused then, so the audit tells nothing."""


def make_gateway(
    guard: Authenticator,
    audit: AuditLog,
    forward: ReverseProxy,
    enrolment: DeviceApi,
    operating: OperatorApi,
    letting: LettingIn,
    ca: str,
    healthy: Callable[[], bool],
    logs: Logs,
    sweep: Callable[[], None],
) -> Starlette:
    """The application that listens where others can reach it; ``sweep`` is called every second."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(_every_second(sweep))
        yield
        sweeping.cancel()
        await forward.close()

    refuse = _refusing(audit)
    handlers = {RequestRefusedError: refuse, HTTPException: refuse, FedtuneError: refuse, Exception: refuse}
    routes = [
        Route("/v1/fleet/{path:path}", forward.forward_request, methods=["POST"]),
        Route("/fedtune/ca", lambda _: PlainTextResponse(ca), methods=["GET"]),
        Route("/health", lambda _: _health(healthy()), methods=["GET"]),
        *log_routes(partial(_for_operators, guard, "read"), operating.store, logs),
        *_device_routes(enrolment),
        *_operator_routes(guard, operating, letting),
    ]
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)


async def _every_second(sweep: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(1.0)
        sweep()


def _health(well: bool) -> Response:
    """For whoever watches the server, hence without a key and without a reason; the log tells more."""
    return _json({"status": "ok"} if well else {"status": "starting"}, 200 if well else 503)


def _device_routes(enrolment: DeviceApi) -> list[Route]:
    return [
        Route("/fedtune/time", _answering(enrolment.get_server_time), methods=["GET"]),
        Route("/fedtune/enroll", _answering(enrolment.enrol_device), methods=["POST"]),
        Route("/fedtune/device/profile", _answering(enrolment.save_profile), methods=["POST"]),
    ]


def _operator_routes(guard: Authenticator, operating: OperatorApi, letting: LettingIn) -> list[Route]:
    def route(role: Role, method: str, path: str, answer: Callable[[str, Request, Any], dict[str, Any]]) -> Route:
        return Route(f"/fedtune/{path}", _for_operators(guard, role, answer), methods=[method])

    return [
        route("submit", "POST", "runs", operating.submit_run),
        route("read", "GET", "runs", operating.list_runs),
        route("read", "GET", "runs/{run}", operating.get_run),
        route("submit", "POST", "runs/{run}/stop", operating.stop_run),
        route("submit", "POST", "runs/{run}/resume", operating.resume_run),
        route("submit", "POST", "runs/{run}/rollback", operating.rollback),
        route("read", "GET", "devices", operating.list_devices),
        route("admin", "DELETE", "devices/{device}", operating.remove_device),
        route("admin", "POST", "devices/{device}/tags", operating.change_device_tags),
        route("admin", "POST", "devices/{device}/release", operating.release),
        route("admin", "POST", "tokens", letting.token),
        route("admin", "GET", "tokens", letting.tokens),
        route("admin", "DELETE", "tokens/{token}", letting.remove_token),
        route("admin", "GET", "operators", letting.operators),
        route("admin", "DELETE", "operators/{operator}", letting.remove_operator),
        route("read", "GET", "audit", letting.lines),
    ]


def _answering(answer: JsonHandler) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        sent = await _sent(request)
        return _json(await run_in_threadpool(answer, request, sent))

    return endpoint


def _for_operators(guard: Authenticator, role: Role, answer: Callable[[str, Request, Any], dict[str, Any]]) -> Endpoint:
    """The key is looked at before the body is read."""

    async def endpoint(request: Request) -> Response:
        who = await run_in_threadpool(guard.authenticate_operator, request, role)
        sent = await _sent(request)
        return _json(await run_in_threadpool(answer, who, request, sent))

    return endpoint


async def _sent(request: Request) -> Any:
    """The JSON a request carries, or None."""
    return read_json(b"".join([chunk async for chunk in stream_limited_body(request, _BODY)]))


def _refusing(audit: AuditLog) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def refuse(request: Request, error: Exception) -> Response:
        status, sentence = _told(request, error)
        if status != _STARTING:
            what = f"{request.method} {request.url.path[:200]}: {sentence}"
            await run_in_threadpool(audit.record_refusal, get_remote_address(request), what, getattr(error, "who", ""))
        return _json({"error": clean_text(sentence, _SENTENCE)}, status)

    return refuse


def _told(request: Request, error: Exception) -> tuple[int, str]:
    """Status and sentence of what was raised while a request was dealt with."""
    match error:
        case RequestRefusedError():
            return error.status, error.message
        case HTTPException():
            return error.status_code, f"there is nothing at {request.url.path[:200]} for {request.method}"
        case ServerError():
            return _STARTING, str(error)
        case FedtuneError():
            return 400, str(error)
        case _:
            return (
                500,
                f"the server could not deal with this ({type(error).__name__}); its operator finds why in its log",
            )


def _json(content: Any, status: int = 200) -> Response:
    return Response(json_text(content), status, media_type="application/json")
