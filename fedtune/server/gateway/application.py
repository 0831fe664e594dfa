"""The gateway serves enrolled devices and operators over HTTPS, and refuses and records all other requests."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
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
from fedtune.server.gateway.access_api import AccessApi
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

__all__ = ["GatewayServices", "make_gateway"]

Endpoint = Callable[[Request], Awaitable[Response]]
JsonHandler = Callable[[Request, Any], dict[str, Any]]
OperatorHandler = Callable[[str, Request, Any], dict[str, Any]]
_BODY = 1 << 20
_SENTENCE = 2000
_STARTING = 503
"""The status while the server is not ready. Nothing is refused then, so the audit log gets no line."""


@dataclass(frozen=True)
class GatewayServices:
    """The services behind the gateway. ``sweep_connections`` is called every second."""

    authenticator: Authenticator
    audit: AuditLog
    proxy: ReverseProxy
    device_api: DeviceApi
    operator_api: OperatorApi
    access_api: AccessApi
    logs: Logs
    ca_certificate: str
    is_healthy: Callable[[], bool]
    sweep_connections: Callable[[], None]


def make_gateway(services: GatewayServices) -> Starlette:
    """Make the application that devices and operators reach over the network."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(_call_every_second(services.sweep_connections))
        yield
        sweeping.cancel()
        await services.proxy.close()

    refuse = _refusing(services.audit)
    handlers = {RequestRefusedError: refuse, HTTPException: refuse, FedtuneError: refuse, Exception: refuse}
    readers = partial(_for_operators, services.authenticator, "read")
    routes = [
        Route("/v1/fleet/{path:path}", services.proxy.forward_request, methods=["POST"]),
        Route("/fedtune/ca", lambda _: PlainTextResponse(services.ca_certificate), methods=["GET"]),
        Route("/health", lambda _: _respond_health(is_healthy=services.is_healthy()), methods=["GET"]),
        *log_routes(readers, services.operator_api.store, services.logs),
        *_device_routes(services.device_api),
        *_operator_routes(services.authenticator, services.operator_api, services.access_api),
    ]
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)


async def _call_every_second(sweep: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(1.0)
        sweep()


def _respond_health(*, is_healthy: bool) -> Response:
    """Reply to a health check. It needs no key, so the reply gives no reason; the log does."""
    return _json({"status": "ok"} if is_healthy else {"status": "starting"}, 200 if is_healthy else 503)


def _device_routes(api: DeviceApi) -> list[Route]:
    return [
        Route("/fedtune/time", _for_devices(api.get_server_time), methods=["GET"]),
        Route("/fedtune/enroll", _for_devices(api.enrol_device), methods=["POST"]),
        Route("/fedtune/device/profile", _for_devices(api.save_profile), methods=["POST"]),
    ]


def _operator_routes(authenticator: Authenticator, api: OperatorApi, access: AccessApi) -> list[Route]:
    def route(role: Role, method: str, path: str, handle: OperatorHandler) -> Route:
        return Route(f"/fedtune/{path}", _for_operators(authenticator, role, handle), methods=[method])

    return [
        route("submit", "POST", "runs", api.submit_run),
        route("read", "GET", "runs", api.list_runs),
        route("read", "GET", "runs/{run}", api.get_run),
        route("submit", "POST", "runs/{run}/stop", api.stop_run),
        route("submit", "POST", "runs/{run}/resume", api.resume_run),
        route("submit", "POST", "runs/{run}/rollback", api.rollback),
        route("read", "GET", "devices", api.list_devices),
        route("admin", "DELETE", "devices/{device}", api.remove_device),
        route("admin", "POST", "devices/{device}/tags", api.change_device_tags),
        route("admin", "POST", "devices/{device}/release", api.release),
        route("admin", "POST", "tokens", access.token),
        route("admin", "GET", "tokens", access.tokens),
        route("admin", "DELETE", "tokens/{token}", access.remove_token),
        route("admin", "GET", "operators", access.operators),
        route("admin", "DELETE", "operators/{operator}", access.remove_operator),
        route("read", "GET", "audit", access.lines),
    ]


def _for_devices(handle: JsonHandler) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        body = await _read_json_body(request)
        return _json(await run_in_threadpool(handle, request, body))

    return endpoint


def _for_operators(authenticator: Authenticator, role: Role, handle: OperatorHandler) -> Endpoint:
    """Return an endpoint that checks the operator's key before it reads the body."""

    async def endpoint(request: Request) -> Response:
        operator = await run_in_threadpool(authenticator.authenticate_operator, request, role)
        body = await _read_json_body(request)
        return _json(await run_in_threadpool(handle, operator, request, body))

    return endpoint


async def _read_json_body(request: Request) -> Any:
    """Return the JSON in the body of a request, or None."""
    return read_json(b"".join([chunk async for chunk in stream_limited_body(request, _BODY)]))


def _refusing(audit: AuditLog) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def refuse(request: Request, error: Exception) -> Response:
        status, sentence = _explain_error(request, error)
        if status != _STARTING:
            what = f"{request.method} {request.url.path[:200]}: {sentence}"
            actor = getattr(error, "actor", "")
            await run_in_threadpool(audit.record_refusal, get_remote_address(request), what, actor)
        return _json({"error": clean_text(sentence, _SENTENCE)}, status)

    return refuse


def _explain_error(request: Request, error: Exception) -> tuple[int, str]:
    """Return the HTTP status and the sentence for an error that a request raised."""
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
                f"the server failed ({type(error).__name__}); the operator finds the reason in its log",
            )


def _json(content: Any, status: int = 200) -> Response:
    return Response(json_text(content), status, media_type="application/json")
