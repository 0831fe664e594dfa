"""What a device tells when it has no update: a code and counts; no value of its data, no path, no column."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Error, Message, RecordDict

from fedtune.device import client_app as apps
from fedtune.device.device_home import DeviceHome
from fedtune.device.node import DeviceNode
from fedtune.device.problems import problem_of
from fedtune.device.trainer import Trainer
from fedtune.device.trainer_channel import Frame
from fedtune.errors import DataError, FedtuneError, MemoryBudgetError, SourceError
from fedtune.flower.message_identity import set_message_id, set_node_identity
from fedtune.recipe.schema import Recipe
from fedtune.server.class_payloads import ClassPayload
from fedtune.server.client_device import ClientDevice
from fedtune.server.replies import ExpectedReply, receive_update
from fedtune.training import clear_run_context, get_model_state, get_run_context
from fedtune.wire.client_update import pack
from fedtune.wire.masked_weights import encode_masked_state
from fedtune.wire.protocol_codes import SENTENCES, Problem, parse_problem
from tests.federations import words

SECRET = "patient 4711 has a rash"


def order_for(recipe: Recipe, labels: str) -> Frame:
    shop = get_run_context(recipe.model_dump_json())
    payload = pack(encode_masked_state(get_model_state(shop.model, shop.shared_names)))
    clear_run_context()
    return Frame(
        {"recipe": recipe.model_dump_json(), "round": 1, "client": 0, "run_id": "run", "label_names": labels}, payload
    )


def csv(tmp_path: Path, name: str, *lines: str) -> str:
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"csv:{path}"


@pytest.fixture
def text_order(home: Path, tmp_path: Path) -> Frame:
    recipe = words(tmp_path)
    return order_for(recipe, json.dumps(list(get_run_context(recipe.model_dump_json()).corpus.label_names)))


def told(answer: Frame, folder: Path) -> str:
    """What leaves a device for an answer of its trainer, by the real node; also checks that it is of the table."""
    sent: list[str] = []

    class Fleet:
        def push_error(self, order: bytes, code: int, reason: str) -> None:
            sent.append(f"{code} {reason}")

    node = DeviceNode(None, Fleet(), None, type("Clock", (), {"synchronise": print})(), print, print)  # type: ignore[arg-type]
    node._send(b"", answer)
    assert parse_problem(sent[0].partition(" ")[2].removeprefix("declined: ")) is not None
    return sent[0]


HOSTILE: Mapping[str, tuple[tuple[str, ...], str]] = {
    "labels that are the text itself": (("text,label", f"{SECRET},{SECRET}", "fine,1"), "unknown-labels rows=2"),
    "one label of many": (("text,label", "good,good", f"bad,{SECRET}", f"so,{SECRET}"), "unknown-labels rows=2"),
    "a column that is missing": ((f"{SECRET},label", "a,good"), "data-columns columns=1"),
    "rows without a label": (("text,label", f"{SECRET},", "b,good"), "data-values"),
    "an empty file": ((f"{SECRET},label",), "data-unfit"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_an_error_about_the_data_tells_a_code_and_counts_only(text_order: Frame, tmp_path: Path, what: str) -> None:
    lines, code = HOSTILE[what]
    source = csv(tmp_path, "private-name.csv", *lines)
    answer = Trainer(source, 4_000_000_000, 0).run_request(text_order, lambda: None)
    assert answer.header["kind"] == "failed"
    leaving = told(answer, tmp_path)
    assert leaving == f"2 {code}"
    for hidden in (SECRET, "4711", "private-name", str(tmp_path)):
        assert hidden not in leaving
    assert answer.header["detail"], "the device's own log has the details"


def test_a_device_that_goes_on_with_a_kept_answer_tells_first_what_it_holds(tmp_path: Path) -> None:
    done: list[object] = []

    class Fleet:
        def push_update(self, order: bytes, payload: bytes, report: object, seconds: float) -> None:
            done.append("answered")

    home = DeviceHome(tmp_path / "device")
    holding = {"examples": 12, "labels": {}}
    header = {"kind": "trained", "report": {}, "holding": holding, "seconds": 1.0}
    home.save_pending("answer", *Frame(header, b"deltas").pieces())
    clock: Any = type("Clock", (), {"synchronise": print})()
    fleet: Any = Fleet()
    keeper: Any = None
    node = DeviceNode(home, fleet, keeper, clock, done.append, print)
    node._carry_out(b"order")
    assert done == [holding, "answered"]


def test_a_device_without_its_file_does_not_tell_the_path(text_order: Frame, tmp_path: Path) -> None:
    answer = Trainer(f"csv:{tmp_path}/gone.csv", 4_000_000_000, 0).run_request(text_order, lambda: None)
    assert "gone.csv" in answer.header["detail"]
    assert told(answer, tmp_path) in ("2 data-unfit", "2 source-unreadable")


def test_an_order_it_cannot_read_and_a_recipe_it_does_not_know_are_codes(text_order: Frame, tmp_path: Path) -> None:
    trainer = Trainer("sample:digits", 4_000_000_000, 0)
    for header in (
        {"recipe": SECRET},
        {**text_order.header, "label_names": SECRET},
        {**text_order.header, "recipe": "{}"},
    ):
        answer = trainer.run_request(Frame(header, b""), lambda: None)
        assert SECRET not in told(answer, tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        ValueError(SECRET),
        KeyError(SECRET),
        OSError(28, SECRET, SECRET),
        FileNotFoundError(2, "x", SECRET),
        MemoryError(SECRET),
        DataError(SECRET),
        SourceError(SECRET),
        MemoryBudgetError(SECRET),
        FedtuneError(SECRET),
        DataError(SECRET, code=SECRET),
        DataError("", code="unknown-labels", counts={SECRET: 1}),
        DataError("", code="unknown-labels", counts={"rows": 10**30}),
        DataError("", code="data-values", counts={"rows": -4}),
        type(SECRET, (Exception,), {})(SECRET),
    ],
)
def test_whatever_is_raised_only_codes_of_the_table_travel(error: Exception) -> None:
    text = problem_of(error).text
    assert SECRET not in text
    assert parse_problem(text) is not None
    assert len(text) < 120


@pytest.mark.parametrize("code", SENTENCES)
def test_every_code_comes_back_as_its_sentence(code: str) -> None:
    every = "needed_mb allowed_mb rows columns code tries signal device server needed_kb allowed_kb free_kb"
    names = dict.fromkeys([*every.split(), "bytes", "groups", "empty"], 7)
    counts = {name: count for name, count in names.items() if f"{{{name}}}" in SENTENCES[code]}
    problem = Problem(code, counts)
    assert parse_problem(problem.text) == problem
    assert "{" not in problem.remote_sentence


@pytest.mark.parametrize(
    "text",
    [
        *("", "nonsense", "unknown-labels", "unknown-labels rows=x", "unknown-labels rows=1 rows=1"),
        *("data-unfit rows=1", "unknown-labels rows=9999999999999999", "unknown-labels rows=1\n"),
        *("code-failed " + "a" * 10_000, "\x1b[31m"),
    ],
)
def test_what_is_no_code_of_the_table_is_not_read_as_one(text: str) -> None:
    assert parse_problem(text) is None


def test_a_stock_supernode_s_app_replies_with_a_code_and_not_the_exception(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(message: Message, context: Context) -> Message:
        raise DataError(SECRET, code="unknown-labels", counts={"rows": 3})

    monkeypatch.setattr(apps, "train_round", fail)
    monkeypatch.setattr(apps, "_without_attack", lambda message: message)  # the message has no request
    set_node_identity(1)
    message = Message(RecordDict(), 2, "train")
    set_message_id(message, "1")
    reply = apps.deployed(message, Context(1, 2, {}, RecordDict(), {}))
    assert (reply.error.code, reply.error.reason) == (2, "unknown-labels rows=3")


def reply_with(reason: str) -> tuple[str, str]:
    set_node_identity(1)
    message = Message(RecordDict(), 2, "train")
    set_message_id(message, "1")
    reply = Message(Error(code=2, reason=reason), reply_to=message)
    record, sent = receive_update(
        reply, ExpectedReply(0, ClientDevice("phone"), ClassPayload({}, {}, {})), Path("nowhere")
    )
    assert sent is None
    return record.status, record.reason


def test_the_operator_reads_the_sentence_of_a_code_and_strange_text_is_cleaned() -> None:
    status, reason = reply_with("declined: memory-step allowed_mb=100 needed_mb=250")
    assert status == "declined"
    assert reason.startswith("a step needs about 250 MB of memory, and this device allows 100 MB; details are in")
    assert reply_with("\x1b]0;owned\x07")[1] == r"code 2: \x1b]0;owned\x07"
    assert len(reply_with("x" * 20_000_000)[1]) <= 220
