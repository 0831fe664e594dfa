"""Forward the calls of devices to the SuperLink: only Flower's fleet paths, bodies and signed headers unchanged."""

from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import httpx
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from fedtune.flower.unix_socket import ADDRESS
from fedtune.server.gateway.authentication import Authenticator, get_remote_address
from fedtune.server.gateway.redelivery import RedeliveryBuffer
from fedtune.server.gateway.refusal import AuditLog, RequestRefusedError
from fedtune.server.gateway.uploads import Uploads
from fedtune.server.presence import Presence
from fedtune.wire.error_codes import STORED_MESSAGE_HEADER

__all__ = ["ReverseProxy", "stream_limited_body"]

_PATHS = frozenset(
    f"/v1/fleet/{name}"
    for name in (
        "activate-node",
        "confirm-message-received",
        "deactivate-node",
        "get-fab",
        "get-run",
        "pull-messages",
        "pull-object",
        "push-messages",
        "push-object",
        "send-node-heartbeat",
    )
)
_PULL, _PUSH, _PUSH_OBJECT = "/v1/fleet/pull-messages", "/v1/fleet/push-messages", "/v1/fleet/push-object"
_PROTOBUF = "application/protobuf"
_SMALL, _ANNOUNCED, _OBJECT = 1 << 16, 1 << 20, 6 << 20
"""The largest body in bytes of a small call, of a call that announces a reply, and of a call with a 5 MiB chunk."""
_OF_THE_CONNECTION = frozenset(
    {
        *("connection", "content-length", "expect", "host", "keep-alive", "proxy-authorization", "te", "trailer"),
        *("transfer-encoding", "upgrade"),
    }
)
_IDLE_SECONDS = 2.0
"""The SuperLink closes a connection after 5 idle seconds, and a call sent at this moment would fail."""
_DIGITS = 16
_PATIENCE = httpx.Timeout(60.0, connect=5.0, pool=30.0)


class ReverseProxy:
    """Forwards the fleet calls of enrolled devices to the SuperLink on ``socket``."""

    def __init__(
        self, guard: Authenticator, audit: AuditLog, presence: Presence, uploads: Uploads, socket: Path, body_limit: int
    ) -> None:
        self._guard, self._audit, self._presence, self._uploads = guard, audit, presence, uploads
        self._body_limit = body_limit
        self._handout = RedeliveryBuffer()
        many = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=_IDLE_SECONDS)
        transport = httpx.AsyncHTTPTransport(uds=str(socket), limits=many)
        self._client = httpx.AsyncClient(transport=transport, timeout=_PATIENCE)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def forward_request(self, request: Request) -> Response:
        """Forward a call and return the response."""
        path = request.url.path
        if path not in _PATHS:
            raise RequestRefusedError(404, f"{path} is not for devices; only Flower's fleet paths are")
        name = await run_in_threadpool(self._guard.identify_device, request)
        if (
            path == _PULL
            and (body := self._handout.get_unconfirmed_message(name, request.headers.get(STORED_MESSAGE_HEADER)))
            is not None
        ):
            self._presence.record_contact(await run_in_threadpool(self._guard.authenticate_device, request))
            return Response(body, media_type=_PROTOBUF)
        try:
            body = await self._taken(request, path)
            answer = await self._client.send(self._onward(request, body), stream=True)
        except ClientDisconnect:
            return Response(status_code=400)
        except httpx.TransportError:
            return JSONResponse({"error": "the server is starting; try again shortly"}, 503)
        if answer.status_code in (401, 403):
            what = f"at {path}: the SuperLink does not accept its signature"
            await run_in_threadpool(self._audit.record_refusal, get_remote_address(request), what, name)
        return await self._answered(request, name, answer)

    async def _taken(self, request: Request, path: str) -> bytes:
        """Return the body of a call within its size limit. Objects of a reply count towards the round's limit."""
        if path not in (_PUSH, _PUSH_OBJECT):
            return await _whole(request, min(_SMALL, self._body_limit))
        name = await run_in_threadpool(self._guard.authenticate_device, request)  # before a large body is read
        if path == _PUSH:
            body = await _whole(request, min(_ANNOUNCED, self._body_limit))
            await run_in_threadpool(self._uploads.begin, name, body)
            return body
        body = await _whole(request, min(_OBJECT, self._body_limit))
        await run_in_threadpool(self._uploads.add, name, body)
        return body

    async def _answered(self, request: Request, name: str, answer: httpx.Response) -> Response:
        """Return the SuperLink's response for the device."""
        if answer.is_success:
            self._presence.record_contact(name)
        if request.url.path == _PULL and answer.is_success:
            return await self._handed(name, answer)
        if request.url.path == _PUSH and answer.is_success:
            self._handout.remove_message(name, request.headers.get(STORED_MESSAGE_HEADER))
        return StreamingResponse(_body(answer), answer.status_code, _kept(answer.headers))

    async def _handed(self, name: str, answer: httpx.Response) -> Response:
        """Remember a response that may contain a message, and return it. It is small."""
        body = b"".join([chunk async for chunk in _body(answer)])
        self._handout.remember_message(name, body)
        return Response(body, answer.status_code, _kept(answer.headers))

    def _onward(self, request: Request, body: bytes) -> httpx.Request:
        url = f"http://{ADDRESS}{request.url.path}"
        return self._client.build_request(request.method, url, headers=_kept(request.headers), content=body)


async def _whole(request: Request, limit: int) -> bytes:
    return b"".join([chunk async for chunk in stream_limited_body(request, limit)])


async def stream_limited_body(request: Request, limit: int) -> AsyncIterator[bytes]:
    """Yield the body of a request; raise RequestRefusedError if it is, or is declared to be, over ``limit`` bytes."""
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or len(declared) > _DIGITS or int(declared) > limit:
        raise _too_large(limit)
    left = limit
    async for chunk in request.stream():
        left -= len(chunk)
        if left < 0:
            raise _too_large(limit)
        yield chunk


def _too_large(limit: int) -> RequestRefusedError:
    return RequestRefusedError(413, f"the request is larger than the limit of {limit} bytes")


async def _body(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    finally:
        await answer.aclose()


def _kept(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in _OF_THE_CONNECTION}
