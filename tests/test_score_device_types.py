"""Every figure in the store says on which type of device it was computed: of the server, of a client, of a mean.

No card is needed: clients say that they computed on one, as the report of a device with a card does. A simulation on
the pretended card is in test_accelerator.py.
"""

import csv
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from flwr.app import Message, MetricRecord

from fedtune.cli.device_type_view import describe_device_types, list_compared_types
from fedtune.cli.main import cli
from fedtune.errors import ClientUpdateError
from fedtune.server.reports import read_report, read_score
from fedtune.tracking import RoundRecord, Store
from fedtune.tracking.device_types import join_device_types
from tests.federations import Ended, execute, order_of, spoilt
from tests.store_examples import a_client_record, a_round, fill
from tests.streams import resolve_stream

STREAM: dict[str, Any] = {
    "setting": "class",
    "tasks": {"size": 5, "rounds": 1},
    "drift": {"signal": "plain"},
}
DEVICES = [{"name": "phone", "count": 1}, {"name": "tablet", "count": 3}]
GOOD: dict[str, Any] = {
    "loss": 0.5,
    "seconds": 1.0,
    "activation_memory": 0,
    "peak_memory": 9,
    "num_holdout_predictions": 7,
    "holdout_loss": 0.0,
    "holdout_accuracy": 0.0,
    "extra_holdout_metrics": [],
    "trained_holdout_metrics": [],
}


MOMENTS = ("before", "after")


def say(*argv: str) -> str:
    done = CliRunner().invoke(cli, argv, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def claim_card(message: Message, reply: Message) -> Message:
    """Client 1 says that it computes on a card, and client 2 is of a version that says nothing where it only scores."""
    report = reply.content.metric_records["report"]
    if order_of(message)[1] == 1:
        report["device_code"] = 1
    elif not report["num_examples"]:
        del report["device_code"]
    return reply


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDTUNE_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("COLUMNS", "200")
        recipe = resolve_stream(STREAM, evaluation={"local_holdout": 0.2, "clients": "all"}, devices=DEVICES)
        plain = execute(recipe, run="plain")
        mixed = execute(recipe, spoilt(claim_card, (1, 2)), run="mixed")
        assert mixed.hashes == plain.hashes
        yield mixed


def test_a_client_score_has_the_type_that_its_device_reports(ended: Ended) -> None:
    found = {(one.client, one.moment, one.device_type) for done in ended.rounds for one in done.client_scores}
    trained = {(client, moment, "cuda" if client == 1 else "cpu") for client in range(4) for moment in MOMENTS}
    shared = {(0, "shared", "cpu"), (1, "shared", "cuda"), (2, "shared", None), (3, "shared", "cpu")}
    assert found == trained | shared


def test_a_mean_over_clients_has_the_types_of_all(ended: Ended) -> None:
    found = {(one.scope, one.moment, one.device_type) for done in ended.rounds for one in done.task_scores}
    before = {("client:0", "cpu"), ("client:1", "cuda"), ("client:2", "cpu"), ("client:3", "cpu")}
    before |= {("class:phone", "cpu"), ("class:tablet", "cpu+cuda")}
    unsaid = {"client:2", "class:tablet"}
    shared = {(scope, None if scope in unsaid else kind) for scope, kind in before}
    assert found == {(scope, "before", kind) for scope, kind in before} | {(s, "shared", kind) for s, kind in shared}


def test_a_metric_has_the_type_of_the_server_or_of_the_clients_behind_it(ended: Ended) -> None:
    scored = {(one.split, one.domain, one.name): one.device_type for one in ended.rounds[-1].metrics}
    for split in ("validation", "test", "test-before"):
        assert scored[split, "all", "accuracy"] == "cpu"
    assert scored["local", "all", "loss"] == "cpu+cuda"
    assert [scored["drift", domain, "plain"] for domain in ("all", "phone", "tablet")] == [
        "cpu+cuda",
        "cpu",
        "cpu+cuda",
    ]
    others = {kind for (split, _, name), kind in scored.items() if split == "drift" and name != "plain"}
    assert others <= {None}


@pytest.mark.usefixtures("ended")
def test_types_leave_the_store_with_the_figures(tmp_path: Path) -> None:
    shown = json.loads(say("runs", "show", "mixed", "--json"))
    assert {one["device_type"] for one in shown["metrics"] if one["split"] == "local"} == {"cpu+cuda"}
    spread = {(one["moment"], one["device_type"]) for one in shown["clients"]}
    assert spread == {("before", "cpu+cuda"), ("after", "cpu+cuda"), ("shared", None)}
    say("runs", "export", "mixed", "-o", str(tmp_path / "out"))
    for table, kinds in (("client_scores", {"cpu", "cuda", ""}), ("task_scores", {"cpu", "cuda", "cpu+cuda", ""})):
        with (tmp_path / "out" / f"{table}.csv").open() as file:
            assert {row["device_type"] for row in csv.DictReader(file)} == kinds


@pytest.mark.usefixtures("ended")
def test_a_run_on_one_type_shows_none_and_a_mixed_one_says_who_computed_on_which() -> None:
    mixed, plain = say("runs", "show", "mixed"), say("runs", "show", "plain")
    assert "server cpu; clients (phone) cpu; clients (tablet) cpu+cuda" in mixed
    assert [line.split()[-1] for line in mixed.splitlines() if "after training" in line] == ["cpu+cuda"] * 2
    assert "computed on" not in plain
    assert "cpu" not in plain
    [row] = [line.split() for line in say("runs", "compare", "plain", "mixed").splitlines() if "computed on" in line]
    assert row == ["computed", "on", "cpu", "cpu+cuda"]


@pytest.mark.parametrize("read", [read_report, read_score])
@pytest.mark.parametrize("code", [3, -1, 0.5, [1]])
def test_a_type_that_does_not_exist_is_refused(read: Any, code: Any) -> None:
    report = GOOD | {"num_examples": 5 if read is read_report else 0}
    assert read(MetricRecord(report | {"device_code": 2})).device_type == "mps"
    with pytest.raises(ClientUpdateError, match="device_code"):
        read(MetricRecord(report | {"device_code": code}))


def test_a_client_that_scores_and_does_not_say_where_is_of_unknown_type() -> None:
    assert read_report(MetricRecord(GOOD | {"num_examples": 5})).device_type == "cpu"
    said: Mapping[int | None, str | None] = {None: None, 0: "cpu", 1: "cuda", 2: "mps"}
    for code, kind in said.items():
        report = GOOD | {"num_examples": 0} | ({} if code is None else {"device_code": code})
        assert read_score(MetricRecord(report)).scoring_device_type == kind


def test_several_types_are_joined_and_an_unknown_one_makes_the_mean_unknown() -> None:
    assert join_device_types(["mps", "cpu", "cuda", "cpu"]) == "cpu+cuda+mps"
    assert join_device_types(["cuda", "cuda"]) == "cuda"
    assert join_device_types(["cuda", None]) is None
    assert join_device_types([]) is None
    assert len("cpu+cuda+mps") <= 16  # the width of the columns


def on(number: int, kind: str | None, *clients: str | None) -> RoundRecord:
    """A round on a type of device, with clients on others; None as recorded before the type was."""
    records = [replace(a_client_record(client), device_type=one) for client, one in enumerate(clients)]
    return a_round(number, device_type=kind, client_records=tuple(records))


def test_a_run_that_went_on_elsewhere_names_the_round() -> None:
    moved = [on(0, None), on(1, None, None), on(2, "cuda", "cuda"), on(3, "cpu", "cpu")]
    assert describe_device_types(moved) == (
        f"server cpu, from round 2 on cuda, from round 3 on cpu; clients ({a_client_record(0).device}) cpu+cuda"
    )
    assert describe_device_types([on(0, None), on(1, "cpu", None)]) is None
    assert describe_device_types([]) is None


def test_runs_on_several_types_are_compared_with_them() -> None:
    cpu, card = [on(0, "cpu"), on(1, "cpu", "cpu")], [on(0, "cuda"), on(1, "cuda", "cuda")]
    assert list_compared_types([cpu, card]) == ["cpu", "cuda"]
    assert list_compared_types([cpu, cpu]) == []
    assert list_compared_types([card, [on(0, "cuda"), on(1, "cuda", "cpu")]]) == ["cuda", "cpu+cuda"]


def test_a_store_gives_types_back(home: Path) -> None:
    with Store.open() as store:
        fill(store, rounds=0)
        typed = replace(a_round(1).metrics[0], device_type="cpu+cuda+mps")
        store.commit_round("film-1a2b", a_round(1, metrics=(typed,)))
        assert store.rounds("film-1a2b")[1].metrics == (typed,)
