"""What a device keeps on its disk: damaged, it costs time and no more; at rest, nothing is written."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from flwr.app import Message, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_object_tree

from fedtune.device.device_home import DeviceHome, DeviceIdentity
from fedtune.device.node import DeviceNode
from fedtune.device.server_clock import ServerClock
from fedtune.device.trainer_channel import Frame
from fedtune.device.trainer_supervisor import TrainerSupervisor
from fedtune.errors import DeviceError, UnexpectedReplyError
from fedtune.flower.fleet_client import FleetClient, open_claim
from fedtune.server import certificate_authority

CA = certificate_authority.make_ca_certificate(certificate_authority.generate_private_key()).decode()


class Over(BaseException):
    """Ends a device's endless loop."""


class Line:
    """A server that hands out some orders, then nothing, and ends the device after so many looks."""

    def __init__(self, *orders: bytes, looks: int = 3) -> None:
        self.orders, self.looks = list(orders), looks
        self.holding: list[bytes] = []
        self.sent: list[tuple[bytes, bytes]] = []

    def send_heartbeat(self) -> None:
        """It is heard."""

    def deactivate_node(self) -> None:
        """It is noted."""

    def pull_message(self) -> bytes | None:
        if self.orders:
            return self.orders.pop(0)
        self.looks -= 1
        if self.looks < 0:
            raise Over
        return None

    def mark_message_stored(self, claim: bytes) -> None:
        open_claim(claim)
        self.holding.append(claim)

    def download_message(self, claim: bytes) -> Any:
        raise KeyError("order")

    def push_update(self, claim: bytes, payload: bytes, *_: Any) -> None:
        self.sent.append((claim, payload))

    def push_error(self, claim: bytes, code: int, reason: str) -> None:
        self.sent.append((claim, reason.encode()))


class Resting:
    """A keeper without a trainer."""

    pid = None

    def stop_if_idle(self) -> None:
        """There is nothing to end."""

    def close(self) -> None:
        """Nor here."""


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)


@pytest.fixture
def place(home: Path) -> DeviceHome:
    made = DeviceHome()
    made.create_key()
    made.save_identity(DeviceIdentity("https://127.0.0.1:1", "pi", 7, CA))
    return made


def order(number: int = 1) -> bytes:
    """What the SuperLink hands out for a message, as bytes."""
    metadata = Metadata(
        run_id=number,
        message_id=f"message-{number}",
        src_node_id=1,
        dst_node_id=7,
        reply_to_message_id="",
        group_id="1",
        created_at=1.0,
        ttl=60.0,
        message_type="train",
    )
    message: Message = make_message(metadata, RecordDict())
    told = PullMessagesResponse(
        messages_list=[message_to_proto(message)], message_object_trees=[get_object_tree(message)]
    )
    content: bytes = told.SerializeToString()
    return content


def run(place: DeviceHome, line: Line) -> list[str]:
    """What a device says until its line ends it."""
    said: list[str] = []
    clock = ServerClock(lambda: 5.0)
    node = DeviceNode(
        place, cast("FleetClient", line), cast("TrainerSupervisor", Resting()), clock, lambda _: None, said.append
    )
    with pytest.raises(Over):
        node.run()
    return said


def answer(text: str) -> tuple[bytes, bytes]:
    return Frame({"kind": "failed", "problem": text}).pieces()


def test_an_order_and_its_answer_that_are_whole_are_gone_on_with(place: DeviceHome) -> None:
    place.save_pending("order", order())
    place.save_pending("answer", *answer("source-unreadable"))
    line = Line()
    run(place, line)
    assert line.sent == [(order(), b"source-unreadable")]
    assert place.read_pending("order") is None


Damage = Callable[[bytes], bytes]


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: b"",
        lambda kept: kept[:20],
        lambda kept: kept[:-1],
        lambda kept: kept + b"x",
        lambda kept: bytes(len(kept)),
        lambda kept: kept[:40] + bytes([kept[40] ^ 1]) + kept[41:],
        lambda kept: b"\xff" * 500,
    ],
)
def test_a_damaged_order_is_dropped_with_its_answer_and_the_device_goes_on(place: DeviceHome, damage: Damage) -> None:
    place.save_pending("order", order(1))
    place.save_pending("answer", *answer("code-failed"))
    kept = place.folder / "order"
    kept.write_bytes(damage(kept.read_bytes()))
    line = Line(order(2))
    said = run(place, line)
    assert "the saved train request is damaged and was deleted; the server sends it again" in said
    assert [claim for claim, _ in line.sent] == [order(2)]
    assert line.sent[0][1] == b"order-unreadable"


def test_an_order_that_is_whole_and_no_message_is_dropped_too(place: DeviceHome) -> None:
    place.save_pending("order", PullMessagesResponse().SerializeToString() or b"\x00")
    said = run(place, Line())
    assert "the saved train request is damaged and was deleted; the server sends it again" in said


def test_a_damaged_answer_is_never_sent(place: DeviceHome) -> None:
    place.save_pending("order", order())
    place.save_pending("answer", *answer("source-unreadable"))
    kept = place.folder / "answer"
    content = bytearray(kept.read_bytes())
    content[-3] ^= 1
    kept.write_bytes(content)
    line = Line()
    run(place, line)
    [(_, sent)] = line.sent
    assert b"order-unreadable" in sent, "it is asked anew"


def test_a_message_that_cannot_be_opened_is_told_apart() -> None:
    for content in (b"", b"\xff\xff", PullMessagesResponse().SerializeToString()):
        with pytest.raises(UnexpectedReplyError):
            open_claim(content)


def test_a_device_at_rest_does_not_write_its_disk(place: DeviceHome, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[dict[str, Any]] = []
    real = DeviceHome.write_status

    def note(self: DeviceHome, state: dict[str, Any]) -> None:
        noted.append(state)
        real(self, state)

    monkeypatch.setattr(DeviceHome, "write_status", note)
    run(place, Line(looks=500))
    assert [note["state"] for note in noted] == ["connecting", "online", "stopped"]
    assert place.read_status()["state"] == "stopped"


@pytest.mark.parametrize(
    "change",
    [{"node": "seven"}, {"url": "http://server"}, {"url": 5}, {"ca": "PEM"}, {"ca": None}, {"more": 1}],
)
def test_a_damaged_identity_is_told_in_a_sentence(place: DeviceHome, change: dict[str, Any]) -> None:
    path = place.folder / "identity.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DeviceError, match=r"identity\.json is damaged; leave, and enrol"):
        place.read_identity()


def test_a_damaged_note_is_no_note(place: DeviceHome) -> None:
    for text in ("[]", "5", "{", '"x"'):
        (place.folder / "status.json").write_text(text)
        assert place.read_status() == {}
