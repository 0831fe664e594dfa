"""The round loop: who is asked, what counts, what is refused, and that nothing else leaves a trace in the weights."""

import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from numpy.testing import assert_allclose
from torch import Tensor

from fedtune import checkpoint, merging
from fedtune import paths as homes
from fedtune.device.client_app import app
from fedtune.errors import RunError
from fedtune.flower.message_identity import set_message_id, set_node_identity
from fedtune.recipe.schema import Recipe
from fedtune.server.class_payloads import ClassPayload
from fedtune.server.client_device import ClientDevice
from fedtune.server.replies import ExpectedReply, receive_update
from fedtune.server.selection import sample_cohort
from fedtune.simulation.workers import ClientResult, SequentialWorkers
from fedtune.wire.client_update import ClientReport, ClientUpdate, HoldoutMetrics, decode_tensors, pack
from tests.federations import Ended, Spoil, execute, order_of, outcome, sent_state, spoilt, trivial, words

BAD = 1
REPORT: dict[str, Any] = ClientReport(
    5,
    0.5,
    seconds=1.0,
    activation_memory=10,
    peak_memory=20,
    num_holdout_predictions=4,
    holdout_loss=0.25,
    holdout_accuracy=0.75,
    extra_holdout_metrics=[0.5],
    trained_holdout_metrics=[0.125, 1.0, 0.625],
).to_fields()


def payload_of(reply: Message) -> bytes:
    return bytes(reply.content.array_records["delta"]["safetensors"].data)


def answer(message: Message, payload: bytes, report: Mapping[str, Any] | None = None) -> Message:
    deltas = ArrayRecord({"safetensors": Array("uint8", (len(payload),), "safetensors", payload)})
    content = RecordDict({"delta": deltas})
    if report is not None:
        content["report"] = MetricRecord(dict(report))
    return Message(content, reply_to=message)


def with_deltas(change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Spoil:
    return lambda message, reply: answer(message, pack(change(decode_tensors(payload_of(reply)))), REPORT)


def with_report(report: Mapping[str, Any] | None) -> Spoil:
    return lambda message, reply: answer(message, payload_of(reply), report)


def raising(message: Message, reply: Message) -> Message:
    raise ValueError("the battery is empty")


def put(deltas: dict[str, Tensor], value: float) -> dict[str, Tensor]:
    next(iter(deltas.values())).view(-1)[-1] = value
    return deltas


SPOILS: dict[str, tuple[Spoil, str, str]] = {
    "raises": (raising, "error", "code 2: ValueError('the battery is empty')"),
    "a pickle": (
        lambda message, reply: answer(message, pickle.dumps(decode_tensors(payload_of(reply))), REPORT),
        "rejected",
        "not safetensors",
    ),
    "nothing": (lambda message, reply: Message(RecordDict(), reply_to=message), "rejected", "carries no deltas"),
    "a name too few": (with_deltas(lambda d: dict(list(d.items())[1:])), "rejected", "tensor names differ: missing"),
    "a name too many": (with_deltas(lambda d: d | {"more": torch.zeros(1)}), "rejected", "unknown ['more']"),
    "another shape": (with_deltas(lambda d: {n: t.flatten()[1:] for n, t in d.items()}), "rejected", "has shape"),
    "another precision": (with_deltas(lambda d: {n: t.bfloat16() for n, t in d.items()}), "rejected", "BF16"),
    "not a number": (with_deltas(lambda d: put(d, float("nan"))), "rejected", "not finite"),
    "infinity": (with_deltas(lambda d: put(d, float("-inf"))), "rejected", "not finite"),
    "a large norm": (with_deltas(lambda d: put(d, 1e6)), "rejected", "above federation.max_update_norm 1000"),
    "no report": (with_report(None), "rejected", "carries no report"),
    "half a report": (with_report({"num_examples": 5}), "rejected", "its report: the key 'loss' is missing"),
    "a list": (with_report(REPORT | {"loss": [0.5, 0.5]}), "rejected", "its report: loss is [0.5, 0.5]"),
    "no examples": (with_report(REPORT | {"num_examples": 0}), "rejected", "its report: num_examples is 0, but"),
    "no held-out examples at all": (
        with_report(REPORT | {"num_holdout_predictions": -1}),
        "rejected",
        "num_holdout_predictions is -1, but",
    ),
    "an accuracy above 1": (
        with_report(REPORT | {"holdout_accuracy": 1.5}),
        "rejected",
        "holdout_accuracy is 1.5, but",
    ),
    "a loss that is none": (
        with_report(REPORT | {"holdout_loss": float("nan")}),
        "rejected",
        "holdout_loss is nan, but",
    ),
    "an infinite score": (
        with_report(REPORT | {"trained_holdout_metrics": [float("inf"), 1.0]}),
        "rejected",
        "trained_holdout_metrics.0: it must",
    ),
    "half a score": (
        with_report(REPORT | {"trained_holdout_metrics": [0.5]}),
        "rejected",
        "trained_holdout_metrics: it must be empty, or",
    ),
    "a figure for a list": (
        with_report(REPORT | {"extra_holdout_metrics": 0.5}),
        "rejected",
        "extra_holdout_metrics is 0.5, but",
    ),
    "half an example": (with_report(REPORT | {"num_examples": 0.5}), "rejected", "num_examples is 0.5, but"),
}


@pytest.fixture(scope="module")
def without_the_bad_one(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The same run where the bad client raises in every round."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDTUNE_HOME", str(tmp_path_factory.mktemp("without")))
        return execute(recipe(), spoilt(raising, {BAD}))


def recipe() -> Recipe:
    return trivial("federation.max_update_norm=1000")


@pytest.mark.parametrize("what", SPOILS)
def test_a_bad_reply_is_recorded_with_its_reason_and_never_merged(
    home: Path, without_the_bad_one: Ended, what: str
) -> None:
    spoil, status, reason = SPOILS[what]
    ended = execute(recipe(), spoilt(spoil, {BAD}))
    assert ended.run.status == "completed"
    for record in ended.rounds[1:]:
        [bad] = [found for found in record.client_records if found.client == BAD]
        assert (bad.status, bad.num_examples, bad.bytes_up) == (status, 0, 0)
        assert reason in bad.reason
        assert [found.status for found in record.client_records if found.client != BAD] == ["merged"] * 3
    assert ended.hashes == without_the_bad_one.hashes


def test_the_new_weights_are_the_old_ones_plus_the_mean_by_examples(home: Path) -> None:
    sent: dict[tuple[int, int], tuple[dict[str, Tensor], int]] = {}

    def keep(message: Message, reply: Message) -> Message:
        number, client = order_of(message)
        report = REPORT | {"num_examples": 3 * client + number}
        sent[number, client] = decode_tensors(payload_of(reply)), 3 * client + number
        return answer(message, payload_of(reply), report)

    ended = execute(trivial(), spoilt(keep, range(4)))
    for number in (1, 2):
        before, after = state(ended, number - 1), state(ended, number)
        total = sum(sent[number, client][1] for client in range(4))
        for name, tensor in before.items():
            mean = sum(sent[number, c][0][name].double().numpy() * (sent[number, c][1] / total) for c in range(4))
            assert_allclose(after[name].numpy(), tensor.numpy() + np.asarray(mean), rtol=1e-6, atol=1e-9)


def state(ended: Ended, number: int) -> dict[str, Tensor]:
    saved = ended.rounds[number].checkpoint
    assert saved is not None
    return checkpoint.read_checkpoint(homes.get_runs_folder() / saved.path, saved.sha256)


def test_a_round_below_its_quorum_fails_and_the_run_goes_on(home: Path) -> None:
    ended = execute(trivial("federation.quorum=3"), spoilt(raising, {0, 2}, rounds={1}))
    failed, completed = ended.rounds[1:]
    assert (failed.status, completed.status) == ("failed", "completed")
    assert failed.reason.startswith("2 usable client updates, quorum 3; error: code 2: ValueError")
    assert [sent.status for sent in failed.client_records] == ["error", "unused", "error", "unused"]
    assert ended.hashes[0] == ended.hashes[1] != ended.hashes[2]
    assert (ended.run.status, ended.run.rounds_completed) == ("completed", 1)


def test_a_run_without_one_completed_round_fails_and_says_so(home: Path) -> None:
    with pytest.raises(RunError, match="no round got enough usable client updates; see the reasons in: fedtune runs"):
        execute(trivial(), spoilt(raising, range(4)))
    ended = outcome()
    assert (ended.run.status, ended.run.rounds_completed) == ("failed", 0)
    assert [record.status for record in ended.rounds] == ["completed", "failed", "failed"]
    assert len(set(ended.hashes)) == 1
    assert "no round got enough" in ended.run.reason


def test_the_sample_follows_from_seed_and_round_alone() -> None:
    some = trivial("devices=[{count: 10}]", "federation.clients_per_round=4")
    other = trivial("devices=[{count: 10}]", "federation.clients_per_round=4", "seed=1")
    drawn = [sample_cohort(some, number) for number in range(1, 30)]
    assert drawn == [sample_cohort(some, number) for number in range(1, 30)]
    assert drawn != [sample_cohort(other, number) for number in range(1, 30)]
    assert len({tuple(clients) for clients in drawn}) > 20
    assert {client for clients in drawn for client in clients} == set(range(10))
    assert all(clients == sorted(set(clients)) and len(clients) == 4 for clients in drawn)


def test_only_sampled_clients_are_asked(home: Path) -> None:
    some = trivial("federation.clients_per_round=2", "federation.rounds=3")
    asked: list[tuple[int, int]] = []

    def note(message: Message, reply: Message) -> Message:
        asked.append(order_of(message))
        return reply

    ended = execute(some, spoilt(note, range(4)))
    assert asked == [(number, client) for number in (1, 2, 3) for client in sample_cohort(some, number)]
    assert [[c.client for c in record.client_records] for record in ended.rounds[1:]] == [
        sample_cohort(some, number) for number in (1, 2, 3)
    ]


class Backwards(SequentialWorkers):
    """All clients answer at once, the last one first."""

    def collect_results(self) -> list[tuple[str, ClientResult]]:
        """Every answer, in reverse."""
        answers: list[tuple[str, ClientResult]] = []
        while found := super().collect_results():
            answers += found
        return answers[::-1]


def test_the_order_of_arrival_leaves_no_trace(home: Path) -> None:
    forwards, backwards = execute(trivial(), run="forwards"), execute(trivial(), Backwards(app), run="backwards")
    assert forwards.hashes == backwards.hashes
    assert [r.metrics for r in forwards.rounds] == [r.metrics for r in backwards.rounds]


def test_only_what_is_trained_travels_and_every_byte_is_counted(home: Path, tmp_path: Path) -> None:
    some = words(tmp_path, "federation.rounds=2")
    down: dict[tuple[int, int], bytes] = {}
    up: dict[tuple[int, int], bytes] = {}

    def note(message: Message, reply: Message) -> Message:
        down[order_of(message)] = sent_state(message)
        up[order_of(message)] = payload_of(reply)
        return reply

    ended = execute(some, spoilt(note, range(3)))
    for number, factor, other in ((1, "lora_B", "lora_A"), (2, "lora_A", "lora_B")):
        assert {kind(name) for name in decode_tensors(down[number, 0])} == {"lora_A", "lora_B", "classifier"}
        for client, found in enumerate(ended.rounds[number].client_records):
            assert {kind(name) for name in decode_tensors(up[number, client])} == {factor, "classifier"}
            assert not any(other in name for name in decode_tensors(up[number, client]))
            assert found.bytes_up == len(up[number, client])
            assert found.bytes_down == len(down[number, client])


def kind(name: str) -> str:
    return next((word for word in ("lora_A", "lora_B", "classifier") if word in name), name)


def test_contributions_lie_on_disk_while_they_are_merged_and_are_gone_after_the_round(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    real = merging.merge_round

    def merge(step: Any, before: Any, names: Any, contributions: list[ClientUpdate], told: Any) -> Any:
        seen.append(sorted(str(found.path.relative_to(homes.get_runs_folder())) for found in contributions))
        assert all(found.path.is_file() for found in contributions)
        return real(step, before, names, contributions, told)

    monkeypatch.setattr(merging, "merge_round", merge)
    execute(trivial())
    assert seen[1] == [f"run-1/round-0002.spool/client-{client:06d}.safetensors" for client in range(4)]
    left = sorted(path.name for path in (homes.get_runs_folder() / "run-1").iterdir())
    assert left == ["lock", *(f"round-{number:04d}.safetensors" for number in range(3))]


def test_contributions_are_gone_after_a_round_that_broke_off(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def merge(*_: object) -> None:
        raise RunError("broken off")

    monkeypatch.setattr(merging, "merge_round", merge)
    with pytest.raises(RunError, match="broken off"):
        execute(trivial())
    assert not list((homes.get_runs_folder() / "run-1").glob("*.spool"))


def test_a_spooled_contribution_is_what_was_sent(tmp_path: Path) -> None:
    deltas = {"weight": torch.randn(5, 3), "bias": torch.tensor(2.5)}
    set_node_identity(1)
    message = Message(RecordDict(), 2, "train")
    set_message_id(message, "1")
    reply = answer(message, pack(deltas), REPORT)
    shapes = {name: tuple(tensor.shape) for name, tensor in deltas.items()}
    record, sent = receive_update(
        reply, ExpectedReply(7, ClientDevice("phone"), ClassPayload({}, shapes, {}), bytes_down=99), tmp_path
    )
    assert sent is not None
    assert sent.path.read_bytes() == pack(deltas)
    assert torch.equal(sent.read_rows("weight", 1, 4), deltas["weight"][1:4])
    assert torch.equal(sent.read_rows("bias", 0, 1), deltas["bias"])
    norm = float(torch.cat([deltas["weight"].flatten(), deltas["bias"][None]]).double().norm())
    assert record.update_norm == pytest.approx(norm)
    assert replace(record, update_norm=0.0).__dict__ == {
        "client": 7,
        "device_class": "phone",
        "device_name": None,
        "status": "merged",
        "reason": "",
        "bytes_down": 99,
        "bytes_up": len(pack(deltas)),
        "update_norm": 0.0,
        "staleness": None,
        "num_examples": 5,
        "train_loss": 0.5,
        "seconds": 1.0,
        "activation_memory": 10,
        "peak_memory": 20,
        "device_type": "cpu",
        "accelerator_memory": None,
        "accelerator_reserved": None,
        "stored_bytes": None,
        "anonymous_memory": None,
        "file_memory": None,
        "predicted_anonymous": None,
        "predicted_total": None,
    }
    assert sent.holdout_metrics == HoldoutMetrics(4, 0.25, 0.75, (0.5,))
    assert sent.trained_metrics == HoldoutMetrics(4, 0.125, 1.0, (0.625,))
    reply = answer(message, pack(deltas), {**REPORT, "micro_batch_size": 4})
    record, _ = receive_update(reply, ExpectedReply(7, ClientDevice("phone"), ClassPayload({}, shapes, {})), tmp_path)
    assert (record.status, record.reason) == ("merged", "in micro-batches of 4, to fit its memory")
    assert safetensors.torch.load_file(sent.path).keys() == deltas.keys()
