"""Flower's fleet protocol as a device speaks it, and every private detail of Flower that takes (flwr 1.41 and 1.42).

There is no activation: a registered node's heartbeat brings it online at once, and unlike activation is never refused
because an earlier process of the same device still counts as online.
"""

import datetime
import time
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Error, Message, RecordDict
from flwr.app.message.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import DeactivateNodeRequest, PullMessagesRequest, PullMessagesResponse, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufClientInterceptor, ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient
from google.protobuf.message import DecodeError

from fedtune.errors import UnexpectedReplyError
from fedtune.flower import train_messages
from fedtune.wire.error_codes import STORED_MESSAGE_HEADER

__all__ = [
    "OFFLINE_AFTER_SECONDS",
    "FleetClient",
    "ObsoleteRequestError",
    "TrainMessage",
    "make_reply_metadata",
    "make_signed_headers",
    "open_claim",
]

Request = TypeVar("Request")
Response = TypeVar("Response")
_FORBIDDEN, _RUN_HAS_ENDED = 403, 2007
OFFLINE_AFTER_SECONDS = 120.0
"""How long the server believes in a device it hears nothing of; Flower counts two heartbeat intervals."""


class ObsoleteRequestError(Exception):
    """The server no longer wants this: its run has ended, or its objects are no longer there."""


@dataclass(frozen=True)
class TrainMessage:
    """A message to train: what it asks and the state to start from."""

    metadata: Metadata
    request: dict[str, str | int]
    payload: bytes


def make_signed_headers(key: ec.EllipticCurvePrivateKey, unix: float) -> dict[str, str]:
    """The three headers by which a device proves who it is; the server's clock must be near ``unix``."""
    timestamp = datetime.datetime.fromtimestamp(unix, datetime.UTC).isoformat()
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public_key_to_bytes(key.public_key())).decode(),
        TIMESTAMP_HEADER: timestamp,
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(key, timestamp.encode())).decode(),
    }


class _Signer:
    """Signs each call with the server's time, which ``now`` gives."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, now: Callable[[], float]) -> None:
        self._key, self._now = key, now

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers.update(make_signed_headers(self._key, self._now()))
        return call_next(context)


class _Holding:
    """Tells with each call which message is on this device's disk: one lost on its way is handed out again."""

    def __init__(self) -> None:
        self.message = ""

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers[STORED_MESSAGE_HEADER] = self.message
        return call_next(context)


class _Client(FleetHttpClient):
    """Flower's, which raises a bare ValueError for an answer it cannot read."""

    def _unary_unary(self, **call: Any) -> Any:
        try:
            return super()._unary_unary(**call)
        except ValueError as error:
            if isinstance(error.__cause__, DecodeError):
                raise UnexpectedReplyError("the answer is no message of Flower's") from error
            raise


class FleetClient:
    """Calls of one registered node.

    Raises httpx's errors for what may pass, UnexpectedReplyError for an answer that is none, GoneError for what will
    not pass.
    """

    def __init__(
        self, address: str, ca: str, key: ec.EllipticCurvePrivateKey, node: int, now: Callable[[], float]
    ) -> None:
        self._node = Node(node_id=node)
        self._holding = _Holding()
        interceptors: list[ProtobufClientInterceptor] = [_Signer(key, now), self._holding]
        self._client = _Client.from_server_address(address, False, ca.encode(), interceptors)

    def send_heartbeat(self) -> None:
        """Be online for the next ``OFFLINE_AFTER_SECONDS``."""
        self._client.SendNodeHeartbeat(
            SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=OFFLINE_AFTER_SECONDS / 2)
        )

    def deactivate_node(self) -> None:
        """Be offline from now on."""
        self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))

    def pull_message(self) -> bytes | None:
        """Take the next message, if there is one; the server hands it out until ``holds`` is called with it."""
        response = self._client.PullMessages(PullMessagesRequest(node=self._node))
        if not response.messages_list:
            return None
        claim: bytes = response.SerializeToString()
        open_claim(claim)
        return claim

    def mark_message_stored(self, claim: bytes) -> None:
        """A message that was taken is on the disk."""
        self._holding.message = open_claim(claim)[0].metadata.message_id

    def download_message(self, claim: bytes) -> TrainMessage:
        """The message that was taken, with its content."""
        message, tree = open_claim(claim)
        wanted = [one.object_id for one in iterate_object_tree(tree)]
        contents = {name: self._object(message.metadata.run_id, name) for name in dict.fromkeys(wanted)}
        whole = inflate_object_from_contents(tree.object_id, contents)
        if not isinstance(whole, Message):
            raise TypeError(f"the server sent a {type(whole).__name__} in place of a message")
        return TrainMessage(
            message.metadata,
            train_messages.read_train_request(whole.content),
            train_messages.read_shared_state(whole.content),
        )

    def _object(self, run: int, name: str) -> bytes:
        """One object, as soon as the server has it whole."""
        request = PullObjectRequest(node=self._node, run_id=run, object_id=name)
        while True:
            response = _wanted(self._client.PullObject, request)
            if not response.object_found:
                raise ObsoleteRequestError("the server no longer holds what it sent")
            if response.object_available:
                return response.object_content
            time.sleep(0.1)

    def push_update(
        self, claim: bytes, payload: bytes, report: Mapping[str, float | Sequence[float]], seconds: float
    ) -> None:
        """Send deltas for a message that was taken."""
        self._push(claim, train_messages.make_update_record(payload, report), None, seconds)

    def push_error(self, claim: bytes, code: int, reason: str) -> None:
        """Say why there are no deltas."""
        self._push(claim, None, Error(code, reason), 0.0)

    def _push(self, claim: bytes, content: RecordDict | None, error: Error | None, seconds: float) -> None:
        """Safe to do again with the same content: the server knows an answer by its hash, and takes no second one."""
        asked, _ = open_claim(claim)
        reply = make_message(make_reply_metadata(asked.metadata), content, error)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        run = asked.metadata.run_id
        confirmed = ConfirmMessageReceivedRequest(
            node=self._node, run_id=run, message_object_id=asked.metadata.message_id
        )
        _wanted(self._client.ConfirmMessageReceived, confirmed)
        request = PushMessagesRequest(
            node=self._node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[get_object_tree(reply)],
            clientapp_runtime_list=[seconds],
        )
        response = _wanted(self._client.PushMessages, request)
        objects = get_all_nested_objects(reply)
        for name in response.objects_to_push:
            self._push_object(run, response.session_id, name, objects[name].deflate())

    def _push_object(self, run: int, session: str, name: str, content: bytes) -> None:
        request = PushObjectRequest(
            node=self._node, run_id=run, session_id=session, object_id=name, object_content=content
        )
        if not _wanted(self._client.PushObject, request).stored:
            raise httpx.TransportError("the server let go of a half-sent answer")

    def close(self) -> None:
        """Let go of connections."""
        self._client.close()


def open_claim(claim: bytes) -> tuple[Message, ObjectTree]:
    """The message in a claim; UnexpectedReplyError when it is none, whatever Flower raises then."""
    try:
        response = PullMessagesResponse.FromString(claim)
        return message_from_proto(response.messages_list[0]), response.message_object_trees[0]
    except Exception as error:
        raise UnexpectedReplyError("the message cannot be opened") from error


def _wanted(call: Callable[[Request], Response], request: Request) -> Response:
    """What a call gives; GoneError when the run it is about has ended."""
    try:
        return call(request)
    except httpx.HTTPStatusError as error:
        if error.response.status_code == _FORBIDDEN and _code(error.response) == _RUN_HAS_ENDED:
            raise ObsoleteRequestError("the run has ended") from error
        raise


def _code(response: httpx.Response) -> object:
    """Flower's number of an error; read by hand, since its own reader imports a web framework of fourteen megabytes."""
    try:
        return response.json()["code"]
    except (ValueError, KeyError, TypeError):
        return None


def make_reply_metadata(asked: Metadata) -> Metadata:
    """As Flower makes it, but dated like the message it answers, so that a device's clock has no say in it."""
    return Metadata(
        run_id=asked.run_id,
        message_id="",
        src_node_id=asked.dst_node_id,
        dst_node_id=asked.src_node_id,
        reply_to_message_id=asked.message_id,
        group_id=asked.group_id,
        created_at=asked.created_at,
        ttl=asked.ttl,
        message_type=asked.message_type,
        src_task_id=asked.dst_task_id,
        dst_task_id=asked.src_task_id,
    )
