"""One device's messages on a real SuperLink state: whatever it does costs itself the round and nobody else."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
)
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import HttpGrid
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers

from fedtune.flower.exchange import stream_replies
from fedtune.flower.fleet_client import make_reply_metadata
from fedtune.flower.guarded_grid import GuardedGrid, guard_grid
from fedtune.flower.message_identity import set_node_identity
from fedtune.wire.error_codes import REFUSED

EXPECTED = 31_000


class Link:
    """Flower's own state and handlers, without sockets; ``before_object`` is called before each object is stored."""

    def __init__(self) -> None:
        name = FLWR_IN_MEMORY_DB_NAME
        self.state: Any = LinkStateFactory(name, NoOpFederationManager(), ObjectStoreFactory(name)).state()
        self.run = self.state.create_run("fab", "1", "0" * 64, {}, NOOP_FEDERATION_ID, None, "aid", TaskType.SERVER_APP)
        number: Any = self.state.get_run_info(run_ids=[self.run])[0].primary_task_id
        self.state.claim_task(number)
        self.state.activate_task(number)
        self.task: Any = SimpleNamespace(run_id=self.run, task_id=number)
        self.before_object: Callable[[], None] = lambda: None

    def node(self, name: str) -> int:
        node: int = self.state.create_node("aid", "owner", name.encode(), 60.0)
        self.state.acknowledge_node_heartbeat(node, 60.0)
        return node

    def PushMessages(self, request: Any) -> Any:  # noqa: N802 - the names of Flower's client
        return runtime_handlers.push_messages(request, self.state, self.task)

    def PullMessages(self, request: Any) -> Any:  # noqa: N802
        return runtime_handlers.pull_messages(request, self.state, self.task)

    def PushObject(self, request: Any) -> Any:  # noqa: N802
        self.before_object()
        return runtime_handlers.push_object(request, self.state, self.task)

    def PullObject(self, request: Any) -> Any:  # noqa: N802
        return runtime_handlers.pull_object(request, self.state, self.task)

    def ConfirmMessageReceived(self, request: Any) -> Any:  # noqa: N802
        return runtime_handlers.confirm_message_received(request, self.state, self.task)


@dataclass
class Device:
    """A node that speaks to the link as devices do."""

    link: Link
    number: int
    order: Message | None = field(default=None)

    def claim(self) -> bool:
        request = PullMessagesRequest(node=Node(node_id=self.number))
        found = fleet_handlers.pull_messages(request, self.link.state, self.link.state.object_store)
        if found.messages_list:
            self.order = message_from_proto(found.messages_list[0])
        return bool(found.messages_list)

    def confirm(self) -> None:
        assert self.order is not None
        number = self.order.metadata.message_id
        request = ConfirmMessageReceivedRequest(
            node=Node(node_id=self.number), run_id=self.link.run, message_object_id=number
        )
        fleet_handlers.confirm_message_received(request, self.link.state, self.link.state.object_store)

    def fetched(self) -> bytes:
        assert self.order is not None
        request = PullObjectRequest(
            node=Node(node_id=self.number), run_id=self.link.run, object_id=self.order.metadata.message_id
        )
        content: bytes = fleet_handlers.pull_object(request, self.link.state).object_content
        return content

    def answer(self, content: RecordDict, part: Callable[[dict[str, bytes]], dict[str, bytes]] = dict) -> None:
        """Send a reply; ``part`` may change what of its objects is sent."""
        assert self.order is not None
        reply = make_message(make_reply_metadata(self.order.metadata), content, None)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        objects = {name: found.deflate() for name, found in get_all_nested_objects(reply).items()}
        self.push(message_to_proto(remove_content_from_message(reply)), get_object_tree(reply), part(objects))

    def push(self, proto: Any, tree: ObjectTree, objects: dict[str, bytes]) -> None:
        node = Node(node_id=self.number)
        request = PushMessagesRequest(node=node, messages_list=[proto], message_object_trees=[tree])
        session = fleet_handlers.push_messages(request, self.link.state).session_id
        for name, content in objects.items():
            push = PushObjectRequest(
                node=node, run_id=self.link.run, object_id=name, object_content=content, session_id=session
            )
            fleet_handlers.push_object(push, self.link.state)


@pytest.fixture
def link() -> Link:
    return Link()


@pytest.fixture
def grid(link: Link) -> GuardedGrid:
    set_node_identity(SUPERLINK_NODE_ID, link.run)
    flower = HttpGrid(token="none")
    flower._client = link  # type: ignore[assignment]
    flower._run = SimpleNamespace(run_id=link.run)  # type: ignore[assignment]
    made = guard_grid(flower)
    assert isinstance(made, GuardedGrid)
    made.__class__.run = property(lambda _: SimpleNamespace(run_id=link.run))  # type: ignore[assignment]
    made.expect(EXPECTED)
    return made


def orders(devices: list[Device]) -> dict[int, Message]:
    state = ArrayRecord({"safetensors": Array("uint8", (3000,), "safetensors", bytes(3000))})
    return {
        client: Message(RecordDict({"state": state, "order": ConfigRecord({"client": client})}), one.number, "train")
        for client, one in enumerate(devices)
    }


def update(payload: bytes = b"deltas") -> Any:
    array = Array("uint8", (len(payload),), "safetensors", payload)
    return RecordDict({"delta": ArrayRecord({"safetensors": array}), "report": MetricRecord({"examples": 1})})


def text_of(content: Any) -> str:
    return bytes(content["delta"]["safetensors"].data).decode()


def told(found: list[tuple[int, Message]]) -> dict[int, str]:
    return {client: str(reply.error.reason) if reply.has_error() else text_of(reply.content) for client, reply in found}


def run_round(grid: GuardedGrid, devices: list[Device], answers: list[Callable[[Device], None]]) -> dict[int, str]:
    messages = orders(devices)
    numbers = grid.push_messages(messages.values())
    for device, answer in zip(devices, answers, strict=True):
        assert device.claim()
        answer(device)
    found = {number: client for client, number in enumerate(numbers)}
    gathered = [(found[reply.metadata.reply_to_message_id], reply) for reply in grid.pull_messages(numbers)]
    assert all(reply.error.code == REFUSED for _, reply in gathered if reply.has_error())
    return told(gathered)


def honest(device: Device) -> None:
    assert device.fetched()
    device.confirm()
    device.answer(update())


def test_an_honest_round_comes_back_as_it_was_sent(link: Link, grid: GuardedGrid) -> None:
    devices = [Device(link, link.node(name)) for name in "ab"]
    assert run_round(grid, devices, [honest, honest]) == {0: "deltas", 1: "deltas"}
    assert link.state.num_message_ins() == link.state.num_message_res() == 0


@pytest.mark.parametrize("others", [0, 2])
def test_a_device_that_confirms_its_order_before_it_is_there_costs_itself_the_round(
    link: Link, grid: GuardedGrid, others: int
) -> None:
    devices = [Device(link, link.node(name)) for name in "abc"[: others + 1]]
    early = devices[0]

    def before() -> None:
        if early.order is None and early.claim():
            early.confirm()

    link.before_object = before
    messages = orders(devices)
    numbers = grid.push_messages(messages.values())
    for device in devices[1:]:
        assert device.claim()
        honest(device)
    early.answer(update(b"guessed"))
    found = told([(numbers.index(one.metadata.reply_to_message_id), one) for one in grid.pull_messages(numbers)])
    assert found[0].startswith("it confirmed its train request before it fetched it")
    assert {client: found[client] for client in range(1, others + 1)} == dict.fromkeys(range(1, others + 1), "deltas")


def test_a_device_that_is_gone_gets_no_number(link: Link, grid: GuardedGrid) -> None:
    devices = [Device(link, link.node("a")), Device(link, 4711)]
    gone: list[int] = []
    waiting = stream_replies(grid, orders(devices), 0.3, 0.01, gone.append)
    list(waiting)
    assert gone == [1]


def push_with_array(device: Device, size: int, change: Callable[[bytes], bytes]) -> None:
    """Send an update of ``size`` bytes whose array says of itself what ``change`` makes of the true JSON."""
    honest_fetch(device)
    assert device.order is not None
    content = update(bytes(size))
    array, report = content["delta"]["safetensors"], content["report"]
    [(chunk_id, chunk)] = array.slice_array()
    body = change(array.deflate().partition(b"\x00")[2])
    bad = f"Array {chunk_id} {len(body)}".encode() + b"\x00" + body
    reply = make_message(make_reply_metadata(device.order.metadata), content, None)
    record = _renamed(content["delta"].deflate(), array.object_id, bad)
    records = _renamed(content.deflate(), content["delta"].object_id, record)
    message = _renamed(reply.deflate(), content.object_id, records)
    inner = ObjectTree(object_id=get_object_id(bad), children=[ObjectTree(object_id=chunk_id)])
    middle = ObjectTree(object_id=get_object_id(record), children=[inner])
    outer = ObjectTree(object_id=get_object_id(records), children=[middle, ObjectTree(object_id=report.object_id)])
    tree = ObjectTree(object_id=get_object_id(message), children=[outer])
    reply.metadata.__dict__["_message_id"] = get_object_id(message)
    contents = [chunk.deflate(), bad, record, report.deflate(), records, message]
    proto = message_to_proto(remove_content_from_message(reply))
    device.push(proto, tree, {get_object_id(one): one for one in contents})


def _renamed(content: bytes, old: str, child: bytes) -> bytes:
    """An object that has ``child`` in place of the one called ``old``."""
    return content.replace(old.encode(), get_object_id(child).encode())


def expanding(device: Device) -> None:
    """30 kB on the wire, 600 MB once it is put together."""
    many = json.dumps([0] * 20_000).encode()
    push_with_array(device, 30_000, lambda body: body.replace(b"[0]", many))


def honest_fetch(device: Device) -> None:
    assert device.fetched()
    device.confirm()


def larger(device: Device) -> None:
    honest_fetch(device)
    device.answer(update(bytes(4_000_000)))


def unfinished(device: Device) -> None:
    honest_fetch(device)
    device.answer(update(), lambda objects: dict(list(objects.items())[:2]))


def no_update(device: Device) -> None:
    honest_fetch(device)
    device.answer(RecordDict({"delta": ConfigRecord({"x": 1})}))


def test_a_reply_that_expands_to_600_megabytes_is_refused_before_it_is_expanded(
    link: Link, grid: GuardedGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    inflated: list[int] = []
    real = Array.inflate.__func__  # type: ignore[attr-defined]

    def counting(cls: type[Array], content: bytes, children: Any = None) -> Array:
        found: Array = real(cls, content, children)
        inflated.append(len(found.data))
        return found

    monkeypatch.setattr(Array, "inflate", classmethod(counting))
    devices = [Device(link, link.node(name)) for name in "ab"]
    found = run_round(grid, devices, [expanding, honest])
    assert found[0] == f"its reply expands to 600000000 bytes; the limit of this round is {EXPECTED}"
    assert found[1] == "deltas"
    assert max(inflated) < EXPECTED


def test_a_reply_larger_than_the_round_expects_is_refused_and_deleted(link: Link, grid: GuardedGrid) -> None:
    devices = [Device(link, link.node(name)) for name in "ab"]
    found = run_round(grid, devices, [larger, honest])
    assert found == {0: f"its reply is larger than the limit of this round, {EXPECTED} bytes", 1: "deltas"}


def test_a_reply_that_is_never_sent_to_its_end_does_not_hold_up_the_others(link: Link, grid: GuardedGrid) -> None:
    devices = [Device(link, link.node(name)) for name in "ab"]
    messages = orders(devices)
    numbers = grid.push_messages(messages.values())
    for device, answer in zip(devices, [unfinished, honest], strict=True):
        assert device.claim()
        answer(device)
    assert [reply.metadata.reply_to_message_id for reply in grid.pull_messages(numbers)] == [numbers[1]]
    assert grid.pull_messages(numbers[:1]) == []
    assert grid.pull_messages([]) == []
    assert not grid._arriving, "nobody waits for it any more"


GARBAGE: dict[str, Callable[[bytes], bytes]] = {
    "an array without its list": lambda body: b"{}",
    "an array that is no JSON": lambda body: b"\xff",
    "nested without end": lambda body: b"[" * 5000,
    "a chunk that is none of its own": lambda body: body.replace(b"[0]", b"[7]"),
    "a number of many digits": lambda body: body.replace(b"[0]", b"[" + b"9" * 5000 + b"]"),
    "another shape": lambda body: body.replace(b'"shape": [6]', b'"shape": "x"'),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_a_reply_of_garbage_is_an_error_of_its_own_device(link: Link, grid: GuardedGrid, what: str) -> None:
    def garbage(device: Device) -> None:
        push_with_array(device, 6, GARBAGE[what])

    devices = [Device(link, link.node(name)) for name in "ab"]
    found = run_round(grid, devices, [garbage, honest])
    assert found == {0: "its reply does not follow Flower's protocol; update the client", 1: "deltas"}


def test_a_reply_that_names_another_order_inside_counts_as_its_own(link: Link, grid: GuardedGrid) -> None:
    """What the SuperLink checked counts, not the metadata in the reply's objects."""

    def forged(device: Device) -> None:
        honest_fetch(device)
        assert device.order is not None
        true = make_message(make_reply_metadata(device.order.metadata), update(), None)
        lie = make_message(make_reply_metadata(device.order.metadata), update(), None)
        lie.metadata.__dict__["_reply_to_message_id"] = "f" * 64
        objects = {name: found.deflate() for name, found in get_all_nested_objects(lie).items()}
        true.metadata.__dict__["_message_id"] = lie.object_id
        device.push(message_to_proto(remove_content_from_message(true)), get_object_tree(lie), objects)

    devices = [Device(link, link.node(name)) for name in "ab"]
    assert run_round(grid, devices, [forged, honest]) == {0: "deltas", 1: "deltas"}


def test_a_reply_to_nothing_that_was_sent_is_passed_over(link: Link) -> None:
    class Strange:
        def push_messages(self, messages: Any) -> list[str]:
            return ["1"]

        def pull_messages(self, numbers: Any) -> list[Any]:
            sent = [SimpleNamespace(reply_to_message_id=one) for one in ("7", "1", "1")]
            return [SimpleNamespace(metadata=one, has_error=lambda: False) for one in sent]

    found = list(stream_replies(Strange(), {5: None}, 5.0, 0.01))  # type: ignore[arg-type,dict-item]
    assert [client for client, _ in found] == [5]
