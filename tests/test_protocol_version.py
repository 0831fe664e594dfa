"""A server and a device of different protocols say so in one sentence, whichever of them is older."""

from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedtune.device.device_home import DeviceHome
from fedtune.device.node import DeviceNode
from fedtune.errors import DeviceError
from fedtune.flower.exchange import make_train_messages
from fedtune.flower.message_identity import set_message_id, set_node_identity
from fedtune.flower.train_messages import read_train_request
from fedtune.server.class_payloads import ClassPayload
from fedtune.server.client_device import ClientDevice
from fedtune.server.replies import ExpectedReply, receive_update
from fedtune.wire.client_update import TrainRequest
from fedtune.wire.protocol_version import PROTOCOL_VERSION
from tests.test_rounds import REPORT, answer

NEWER = PROTOCOL_VERSION + 1
ORDER: dict[str, Any] = {"recipe": "{}", "round": 1, "client": 0, "labels": "[]", "run": "run-1"}
"""The train request of protocol 1."""
SERVER_OUTDATED = (
    f"the server's fedtune speaks protocol 1 and the device's protocol {PROTOCOL_VERSION}; update fedtune on the server"
)
DEVICE_OUTDATED = (
    f"its fedtune speaks protocol {PROTOCOL_VERSION} and the server's protocol {NEWER}; update fedtune on the device"
)


def request() -> RecordDict:
    return make_train_messages([0], [2], TrainRequest("{}", 1, 0, "run-1"), b"")[0].content


@pytest.fixture(autouse=True)
def node() -> None:
    set_node_identity(1)


def test_a_train_request_comes_back_as_it_was_sent() -> None:
    assert TrainRequest(**read_train_request(request())) == TrainRequest("{}", 1, 0, "run-1")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "sentence", "code"),
    [
        (RecordDict({"order": ConfigRecord(ORDER)}), SERVER_OUTDATED, "server-outdated"),
        (RecordDict({"train_request": ConfigRecord({"protocol": NEWER})}), DEVICE_OUTDATED, "device-outdated"),
    ],
)
def test_a_device_tells_which_side_to_update(tmp_path: Path, content: RecordDict, sentence: str, code: str) -> None:
    said: list[str] = []

    class Fleet:
        def download_message(self, order: bytes) -> Any:
            return read_train_request(content)

        def push_error(self, order: bytes, number: int, reason: str) -> None:
            said.append(reason)

    with pytest.raises(DeviceError) as caught:
        read_train_request(content)
    assert (str(caught.value), caught.value.code) == (sentence, code)
    others: Any = type("Clock", (), {"synchronise": print, "pid": None})()
    fleet: Any = Fleet()
    device = DeviceNode(DeviceHome(tmp_path), fleet, others, others, print, said.append)
    device._carry_out(b"message")
    server = 1 if code == "server-outdated" else NEWER
    assert said == [sentence, f"{code} device={PROTOCOL_VERSION} server={server}"]


def reason_for(reply: Message, folder: Path) -> str:
    return receive_update(reply, ExpectedReply(0, ClientDevice("phone"), ClassPayload({}, {}, {})), folder)[0].reason


def test_a_device_of_protocol_1_is_told_to_be_updated(tmp_path: Path) -> None:
    """It looks for an order, and replies with this code where there is none."""
    from flwr.app import Error

    message = Message(request(), 2, "train")
    set_message_id(message, "1")
    assert "order" not in message.content.config_records
    reply = Message(Error(2, "order-unreadable"), reply_to=message)
    assert reason_for(reply, tmp_path) == (
        "code 2: it cannot read the train request; update fedtune on the device; details are in the device's own log"
    ).removeprefix("code 2: ")


def test_a_report_of_protocol_1_is_refused_with_the_mend(tmp_path: Path) -> None:
    message = Message(RecordDict(), 2, "train")
    set_message_id(message, "1")
    old = {"examples": 5, "loss": 0.5, "seconds": 1.0, "saved_bytes": 10, "peak_rss": 20, "micro_batch": 0}
    reason = reason_for(answer(message, b"", old), tmp_path)
    assert reason.startswith("its report: ")
    assert reason.endswith("update the client")
    assert "its report" not in reason_for(answer(message, b"", REPORT), tmp_path)
