"""A device's client for Flower's fleet protocol, with the private parts of Flower it needs (flwr 1.41 and 1.42).

It does not activate the node, because the heartbeat of a registered node brings it online at once. Activation would be
refused while an earlier process of the same device still counts as online.
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
"""Seconds without a heartbeat after which a device counts as offline: two of Flower's heartbeat intervals."""


class ObsoleteRequestError(Exception):
    """The server no longer needs the reply: the run has ended, or the message was deleted."""


@dataclass(frozen=True)
class TrainMessage:
    """A message with a train request: the request, and the start state as ``payload``."""

    metadata: Metadata
    request: dict[str, str | int]
    payload: bytes


def make_signed_headers(key: ec.EllipticCurvePrivateKey, unix: float) -> dict[str, str]:
    """Return the three headers that authenticate a device. ``unix`` must be close to the server's time, in seconds."""
    timestamp = datetime.datetime.fromtimestamp(unix, datetime.UTC).isoformat()
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public_key_to_bytes(key.public_key())).decode(),
        TIMESTAMP_HEADER: timestamp,
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(key, timestamp.encode())).decode(),
    }


class _Signer:
    """Signs each call. ``now`` returns the server's time."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, now: Callable[[], float]) -> None:
        self._key, self._now = key, now

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers.update(make_signed_headers(self._key, self._now()))
        return call_next(context)


class _Holding:
    """Adds to each call the id of the message that is on disk. The server delivers any other message again."""

    def __init__(self) -> None:
        self.message = ""

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers[STORED_MESSAGE_HEADER] = self.message
        return call_next(context)


class _Client(FleetHttpClient):
    """Flower's client. It raises a plain ValueError for an invalid response, which this class replaces."""

    def _unary_unary(self, **call: Any) -> Any:
        try:
            return super()._unary_unary(**call)
        except ValueError as error:
            if isinstance(error.__cause__, DecodeError):
                raise UnexpectedReplyError("the reply is not one of Flower's messages") from error
            raise


class FleetClient:
    """The calls of one registered node.

    They raise httpx's errors if a retry may succeed, UnexpectedReplyError for an invalid response, and
    ObsoleteRequestError if a retry cannot succeed.
    """

    def __init__(
        self, address: str, ca: str, key: ec.EllipticCurvePrivateKey, node: int, now: Callable[[], float]
    ) -> None:
        self._node = Node(node_id=node)
        self._holding = _Holding()
        interceptors: list[ProtobufClientInterceptor] = [_Signer(key, now), self._holding]
        self._client = _Client.from_server_address(address, False, ca.encode(), interceptors)

    def send_heartbeat(self) -> None:
        """Report this node as online for the next ``OFFLINE_AFTER_SECONDS``."""
        self._client.SendNodeHeartbeat(
            SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=OFFLINE_AFTER_SECONDS / 2)
        )

    def deactivate_node(self) -> None:
        """Report this node as offline."""
        self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))

    def pull_message(self) -> bytes | None:
        """Return the next message, if any. The server delivers it again until ``mark_message_stored`` is called."""
        response = self._client.PullMessages(PullMessagesRequest(node=self._node))
        if not response.messages_list:
            return None
        claim: bytes = response.SerializeToString()
        open_claim(claim)
        return claim

    def mark_message_stored(self, claim: bytes) -> None:
        """Report with the next calls that this message is on disk."""
        self._holding.message = open_claim(claim)[0].metadata.message_id

    def download_message(self, claim: bytes) -> TrainMessage:
        """Return the message with its content, which is downloaded."""
        message, tree = open_claim(claim)
        wanted = [one.object_id for one in iterate_object_tree(tree)]
        contents = {name: self._object(message.metadata.run_id, name) for name in dict.fromkeys(wanted)}
        whole = inflate_object_from_contents(tree.object_id, contents)
        if not isinstance(whole, Message):
            raise TypeError(f"the server sent a {type(whole).__name__} instead of a message")
        return TrainMessage(
            message.metadata,
            train_messages.read_train_request(whole.content),
            train_messages.read_shared_state(whole.content),
        )

    def _object(self, run: int, name: str) -> bytes:
        """Return an object. Wait until the server has all of it."""
        request = PullObjectRequest(node=self._node, run_id=run, object_id=name)
        while True:
            response = _wanted(self._client.PullObject, request)
            if not response.object_found:
                raise ObsoleteRequestError("the server has deleted the message")
            if response.object_available:
                return response.object_content
            time.sleep(0.1)

    def push_update(
        self, claim: bytes, payload: bytes, report: Mapping[str, float | Sequence[float]], seconds: float
    ) -> None:
        """Send the deltas and the report as the reply to a message."""
        self._push(claim, train_messages.make_update_record(payload, report), None, seconds)

    def push_error(self, claim: bytes, code: int, reason: str) -> None:
        """Reply to a message with an error code and a reason."""
        self._push(claim, None, Error(code, reason), 0.0)

    def _push(self, claim: bytes, content: RecordDict | None, error: Error | None, seconds: float) -> None:
        """Send a reply. The call may be repeated: the server identifies a reply by its hash and accepts it once."""
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
            raise httpx.TransportError("the server dropped a partly sent reply")

    def close(self) -> None:
        """Close all connections."""
        self._client.close()


def open_claim(claim: bytes) -> tuple[Message, ObjectTree]:
    """Return the message in a claim; raise UnexpectedReplyError if Flower cannot read it."""
    try:
        response = PullMessagesResponse.FromString(claim)
        return message_from_proto(response.messages_list[0]), response.message_object_trees[0]
    except Exception as error:
        raise UnexpectedReplyError("the message cannot be opened") from error


def _wanted(call: Callable[[Request], Response], request: Request) -> Response:
    """Return the response of a call; raise ObsoleteRequestError if its run has ended."""
    try:
        return call(request)
    except httpx.HTTPStatusError as error:
        if error.response.status_code == _FORBIDDEN and _code(error.response) == _RUN_HAS_ENDED:
            raise ObsoleteRequestError("the run has ended") from error
        raise


def _code(response: httpx.Response) -> object:
    """Return Flower's error code. Flower's own parser is not used, because it imports a web framework of 14 MB."""
    try:
        return response.json()["code"]
    except (ValueError, KeyError, TypeError):
        return None


def make_reply_metadata(asked: Metadata) -> Metadata:
    """Return Flower's metadata of a reply, with the time of the request, because the device's clock may be wrong."""
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
