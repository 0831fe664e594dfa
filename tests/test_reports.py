"""What a client says of its round: every field bounded, and a payload of the size that the round expects."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

from fedtune.errors import ClientUpdateError
from fedtune.flower.message_identity import set_message_id, set_node_identity
from fedtune.server.class_payloads import ClassPayload
from fedtune.server.client_device import ClientDevice
from fedtune.server.replies import ExpectedReply, receive_update
from fedtune.server.reports import read_report
from fedtune.tracking import ClientRecord
from fedtune.tracking.run_summary import compute_train_loss
from fedtune.wire.client_update import ClientReport, TensorSpec, pack
from tests.federations import execute, spoilt, trivial
from tests.test_rounds import answer, payload_of

LISTS = {"extra_holdout_metrics": [0.5], "trained_holdout_metrics": [0.25, 1.0, 0.5]}
REPORT = ClientReport(
    5, 0.5, seconds=1.0, activation_memory=10, peak_memory=20, num_holdout_predictions=4, holdout_loss=0.25
)
GOOD: dict[str, Any] = REPORT.to_fields() | LISTS
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("num_examples", value) for value in (0, -1, 10**18, 10**9 + 1, 5.0, 0.5, NAN)),
        *(("seconds", value) for value in (NAN, INF, -1.0, 1e300)),
        *(("activation_memory", value) for value in (NAN, -1, 10**18, 1e300, 0.5)),
        *(("peak_memory", value) for value in (NAN, 1e300, INF, -5, 2**62)),
        *(("loss", value) for value in (INF, -INF, 1e300)),
        *(("holdout_loss", value) for value in (NAN, INF, 1e300)),
        *(("holdout_accuracy", value) for value in (NAN, -0.1, 1.5)),
        *(("num_holdout_predictions", value) for value in (-1, 10**18, 2.0)),
        *(("micro_batch_size", value) for value in (0, -1, 10**18, NAN)),
        *((name, [1, 2]) for name in GOOD if name not in LISTS),
        *((name, value) for name in LISTS for value in (1.0, [INF, 1.0], [1e300, 0.5], [0.5] * 65)),
        ("trained_holdout_metrics", [0.5]),
    ],
)
def test_a_report_with_a_field_out_of_its_bounds_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ClientUpdateError, match=rf"its report: {field}\b.*update the client$"):
        read_report(MetricRecord(GOOD | {field: value}))


@pytest.mark.parametrize("report", [{}, {"num_examples": 5}, GOOD | {"more": 1}])
def test_a_report_with_fields_too_few_or_too_many_is_refused(report: dict[str, Any]) -> None:
    with pytest.raises(ClientUpdateError, match="its report: "):
        read_report(MetricRecord(report))


def test_a_report_of_a_hundred_thousand_numbers_is_answered_shortly() -> None:
    with pytest.raises(ClientUpdateError) as caught:
        read_report(MetricRecord(GOOD | {"loss": [0.25] * 100_000}))
    assert len(str(caught.value)) < 300


def test_bounds_hold_at_their_ends_and_a_loss_may_be_kept_back() -> None:
    edge = GOOD | {"num_examples": 10**9, "seconds": 0, "activation_memory": 0, "peak_memory": 2**50, "loss": 0.0}
    edge |= {"holdout_accuracy": 1}
    assert read_report(MetricRecord(edge)).to_fields() == edge
    assert math.isnan(read_report(MetricRecord(GOOD | {"loss": NAN})).loss)


def test_more_examples_than_the_device_can_have_trained_on_are_refused() -> None:
    assert read_report(MetricRecord(GOOD), 5).num_examples == 5
    with pytest.raises(ClientUpdateError, match=r"counts 5 examples, but of what the device declared .* on 4 at most"):
        read_report(MetricRecord(GOOD), 4)


def receive_from(tmp_path: Path, payload: bytes, part: ClassPayload) -> ClientRecord:
    set_node_identity(1)
    message = Message(RecordDict(), 2, "train")
    set_message_id(message, "1")
    deltas = ArrayRecord({"safetensors": Array("uint8", (len(payload),), "safetensors", payload)})
    reply = Message(RecordDict({"delta": deltas, "report": MetricRecord(GOOD)}), reply_to=message)
    return receive_update(reply, ExpectedReply(0, ClientDevice("phone"), part), tmp_path)[0]


def test_a_payload_larger_than_the_round_expects_is_refused_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    monkeypatch.setattr("fedtune.server.replies.write_bytes_atomically", lambda path, content: written.append(path))
    part = ClassPayload({}, {"a": (100,)}, {})
    record = receive_from(tmp_path, bytes(1_000_000), part)
    assert record.status == "rejected"
    assert record.reason.startswith("it holds 1000000 bytes, and this round expects ")
    assert not written


@pytest.mark.parametrize("count", [0, 1, 300])
def test_the_expected_size_admits_every_honest_payload_and_little_more(tmp_path: Path, count: int) -> None:
    """Names with letters that JSON writes as six, shapes of many dimensions, tensors of one byte."""
    shapes = {f'layer."{number}"\u00e9\x07.weight': (1,) * 12 for number in range(count)}
    part = ClassPayload({}, shapes, {"moved_offset": TensorSpec((7,), "U8", 9)})
    extras = {"moved_offset": torch.zeros(7, dtype=torch.uint8)}
    payload = pack({**{name: torch.ones(shape) for name, shape in shapes.items()}, **extras})
    assert len(payload) <= part.most_bytes <= len(payload) + 1024 + 400 * (count + 1)
    assert receive_from(tmp_path, payload, part).status == "merged"


@pytest.mark.parametrize(
    "spoil",
    [
        {"peak_memory": NAN},
        {"activation_memory": NAN},
        {"seconds": NAN},
        {"peak_memory": 1e300},
        {"num_examples": 10**18},
    ],
)
def test_a_strange_report_costs_its_client_the_round_and_the_run_goes_on(home: Path, spoil: dict[str, Any]) -> None:
    def strange(message: Message, reply: Message) -> Message:
        return answer(message, payload_of(reply), GOOD | spoil)

    ended = execute(trivial(), spoilt(strange, {1}))
    assert ended.run.status == "completed"
    for record in ended.rounds[1:]:
        assert [sent.status for sent in record.client_records] == ["merged", "rejected", "merged", "merged"]
        assert record.client_records[1].reason.startswith(f"its report: {next(iter(spoil))}")


@pytest.mark.parametrize("overrides", [(), ("train.local_steps=null", "train.local_epochs=2")])
def test_a_simulated_client_cannot_claim_more_examples_than_it_holds(home: Path, overrides: tuple[str, ...]) -> None:
    def claim(message: Message, reply: Message) -> Message:
        honest = dict(reply.content.metric_records["report"])
        assert isinstance(honest["num_examples"], int)
        return answer(message, payload_of(reply), honest | {"num_examples": honest["num_examples"] * 10})

    ended = execute(trivial("federation.rounds=1", *overrides), spoilt(claim, {2}))
    assert [sent.status for sent in ended.rounds[1].client_records] == ["merged", "merged", "rejected", "merged"]
    assert "of what the device declared" in ended.rounds[1].client_records[2].reason


def record(examples: int, loss: float) -> ClientRecord:
    counts = dict.fromkeys(("bytes_down", "bytes_up", "activation_memory", "peak_memory"), 0)
    kept = {"client": 0, "device_class": "", "status": "merged", "reason": "", "seconds": 0.0, "update_norm": 1.0}
    return ClientRecord(num_examples=examples, train_loss=loss, **kept, **counts)  # type: ignore[arg-type]


def test_a_true_loss_of_zero_counts_and_a_withheld_one_does_not() -> None:
    assert compute_train_loss([record(10, 0.0), record(10, 1.0)]) == 0.5
    assert compute_train_loss([record(10, 0.0)]) == 0.0
    assert compute_train_loss([record(1, NAN), record(10, 1.0)]) == 1.0
    assert math.isnan(compute_train_loss([record(1, NAN)]))
    assert math.isnan(compute_train_loss([record(1, 0.0)])), "a withheld loss in a store from before"
