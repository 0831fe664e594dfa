"""The ledger of a stream in the store: rows, documents, tables, rollback, and what the commands print of it."""

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import select

import fedtune
from fedtune.cli.main import cli
from fedtune.errors import StoreError
from fedtune.tracking import Store, get_default_url, tables
from fedtune.tracking.stream_ledger import get_final_scores, list_visits, make_matrix, make_scope_matrices
from tests.store_examples import a_metric, a_round, fill, start
from tests.stream_examples import ROWS, STREAM, TASKS, a_stream_round, fill_stream, score_by_clients

RUN = "stream-1a2b"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def store() -> Iterator[Store]:
    with Store.open() as opened:
        yield opened


def call(*arguments: str) -> Result:
    done = CliRunner().invoke(cli, ["runs", *arguments])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done


def shown(*arguments: str) -> list[list[str]]:
    lines = call(*arguments).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    return [line.split() for line in lines]


def test_visits_and_scores_are_read_as_they_were_written(store: Store) -> None:
    written = fill_stream(store)
    found = store.rounds(RUN)
    for record, one in zip(written, found, strict=True):
        ordered = tuple(sorted(record.task_scores, key=lambda score: (score.scope, score.task)))
        assert one.task_scores == ordered
        assert replace(one, tasks=record.tasks, metrics=(), task_scores=()) == replace(
            record, metrics=(), task_scores=()
        )
    assert [(one.visit, one.name, one.first_round, one.last_round) for one in list_visits(found)] == [
        (1, "films", 1, 2),
        (2, "tweets", 3, 4),
        (3, "news", 5, 6),
        (4, "films", 7, 8),
    ]
    assert {(one.opened_by, one.labels) for one in list_visits(found)} == {("recipe", ("no", "a b"))}


def test_the_matrix_has_row_0_and_a_row_for_each_visit_that_ended(store: Store) -> None:
    fill_stream(store)
    matrix = make_matrix(store.run(RUN), store.rounds(RUN))
    assert matrix is not None
    assert (matrix.tasks, matrix.visits, matrix.rows) == (TASKS, (0, 1, 2, 0), tuple(map(tuple, ROWS)))
    assert matrix.examples == (100, 200, 100)
    fill_stream(store, "part-3c4d", rounds=5)  # round 5 has begun the third visit
    part = make_matrix(store.run("part"), store.rounds("part-3c4d"))
    assert part is not None
    assert (part.visits, part.rows) == ((0, 1, 2), tuple(map(tuple, ROWS[:3])))


def test_the_first_score_after_a_border_is_a_clients_row(store: Store) -> None:
    """Asked again in the first round of the next visit, or later, a client scores the model it gets: that round's."""
    start(store, RUN, recipe=json.dumps({"stream": STREAM}), rounds_planned=8)
    for number in range(9):
        told = score_by_clients("before", [0.5 + number / 100] * 2) if number in (1, 3, 6, 8) else ()
        store.commit_round(RUN, replace(a_stream_round(number), task_scores=told))
    found = make_scope_matrices(store.run(RUN), store.rounds(RUN))
    assert list(found) == ["class:phone", "class:tablet", "client:0", "client:2"]
    at_0, at_2, at_5, at_7 = 0.51, 0.53, 0.56, 0.58  # round 8 scores the model of round 7
    expected = [(at_0,) * 2, (at_2,) * 2, (at_5,) * 2, (at_7,) * 2, (None, None)]
    assert found["client:0"].rows == tuple((*row, None) for row in expected)
    assert found["class:tablet"].rows[1] == (0.53 - 0.1, 0.53 - 0.1, None)
    assert found["client:0"].last == 3


def test_a_task_to_come_has_no_score_of_a_state_that_has_begun_to_train_it(store: Store) -> None:
    """Tweets are trained from round 3 on, and the client was away in that round."""
    start(store, RUN, recipe=json.dumps({"stream": STREAM}), rounds_planned=8)
    for number in range(5):
        told = score_by_clients("shared", [0.5 + number / 100] * 2) if number == 3 else ()
        store.commit_round(RUN, replace(a_stream_round(number), task_scores=told))
    rows = make_scope_matrices(store.run(RUN), store.rounds(RUN))["client:0"].rows
    assert rows[1] == (0.53, None, None)


def test_a_run_without_a_stream_has_none(store: Store) -> None:
    fill(store)
    run, rounds = store.run("film"), store.rounds("film-1a2b")
    assert make_matrix(run, rounds) is None
    assert make_scope_matrices(run, rounds) == {}
    assert json.loads(call("show", "film", "--json").stdout)["stream"] is None
    text = call("show", "film").stdout
    assert "figure" not in text
    assert "task" not in text
    assert "forgetting" not in call("compare", "film").stdout


def test_deleting_a_run_deletes_its_visits_and_scores(store: Store) -> None:
    fill_stream(store)
    fill_stream(store, "stream-3c4d", rounds=2)
    store.delete(RUN)
    with store._engine.connect() as connection:
        for table in (tables.tasks, tables.task_scores):
            assert {row.run_id for row in connection.execute(select(table))} == {"stream-3c4d"}


def test_rolled_back_a_visit_is_open_again_and_later_ones_are_gone(store: Store) -> None:
    fill_stream(store)
    store.forget_rounds(RUN, 3, "rolled back")
    rounds = store.rounds(RUN)
    assert [(one.name, one.last_round) for one in list_visits(rounds)] == [("films", 2), ("tweets", None)]
    for number in range(4, 9):
        store.commit_round(RUN, a_stream_round(number))
    assert [one.last_round for one in list_visits(store.rounds(RUN))] == [2, 4, 6, 8]


def test_the_document_has_tasks_matrix_and_figures(store: Store) -> None:
    fill_stream(store)
    [found] = json.loads(call("list", "--json").stdout)
    stream = found["stream"]
    assert (stream["tasks"], stream["matrix"]) == (list(TASKS), [list(row) for row in ROWS])
    assert set(stream) == {"tasks", "matrix", "figures"}
    figures = stream["figures"]
    assert {"accuracy", "forgetting", "bwt", "fwt", "learning", "incremental"} < set(figures)
    assert figures["accuracy"] == pytest.approx((0.85 + 0.45 + 0.9) / 3)
    assert figures["accuracy_all"] == pytest.approx((0.85 + 2 * 0.45 + 0.9) / 4)
    assert figures["forgetting"] == pytest.approx((0.05 + 0.35 + 0.05) / 3)
    assert figures["fwt"] == pytest.approx(0.15)
    # After its end each task is lowest in the first round of the visit in which its score at the end is lowest.
    assert figures["gap"] == pytest.approx(((0.4 - 0.85) + (0.25 - 0.45) + (0.7 - 0.9)) / 3)


def test_the_detailed_document_adds_visits_device_classes_and_clients(store: Store) -> None:
    fill_stream(store)
    document = json.loads(call("show", RUN, "--json").stdout)
    stream = document["stream"]
    assert stream["visits"][1] == {
        "visit": 2,
        "name": "tweets",
        "first_round": 3,
        "last_round": 4,
        "opened_by": "recipe",
        "labels": ["no", "a b"],
        "test_examples": 200,
    }
    assert stream["device_classes"]["tablet"]["matrix"][2] == [pytest.approx(0.5), pytest.approx(0.7), None]
    assert stream["clients"]["2"]["figures"]["accuracy"] == pytest.approx((0.75 + 0.35 + 0.8) / 3)
    assert stream["client_figures"]["accuracy"] == {"mean": pytest.approx((2.2 / 3 + 1.9 / 3) / 2), "clients": 2}
    assert document["rounds"][2]["task_scores"][0] == {
        "scope": "class:phone",
        "moment": "shared",
        "task": "films",
        "num_predictions": 10,
        "accuracy": 0.9,
        "loss": pytest.approx(0.1),
        "device_type": None,
    }
    assert document["rounds"][2]["client_records"][1]["stored_bytes"] == 2001


def test_a_task_that_was_not_scored_is_null(store: Store) -> None:
    rows = [(None,) * 3, (0.9, None, None), (0.6, 0.8, None), (0.5, 0.4, 0.7), (0.8, float("nan"), 0.6)]
    fill_stream(store, rows=rows)
    stream = json.loads(call("show", RUN, "--json").stdout)["stream"]
    assert stream["matrix"] == [[None] * 3, [0.9, None, None], [0.6, 0.8, None], [0.5, 0.4, 0.7], [0.8, None, 0.6]]
    assert stream["figures"]["fwt"] is None
    assert stream["figures"]["accuracy"] == pytest.approx(0.7)


def test_show_prints_tasks_the_matrix_and_the_figures(store: Store) -> None:
    fill_stream(store)
    lines = shown("show", RUN)
    assert ["2", "tweets", "3-4", "recipe", "3/3", "12.0", "s", "12.0", "GB", "4.0", "kB"] in lines
    assert ["before", "training", "(10.0)", "(10.0)", "(10.0)"] in lines
    assert ["after", "tweets", "60.0", "80.0", "(30.0)"] in lines
    assert ["accuracy", "73.3", "73.3", "63.3", "68.3", "of", "2"] in lines
    assert ["forgetting", "15.0", "15.0", "15.0", "15.0", "of", "2"] in lines


def test_a_stream_that_has_just_begun_is_shown(store: Store) -> None:
    fill_stream(store, rounds=1)
    lines = shown("show", RUN)
    assert ["1", "films", "1…", "recipe", "3/3", "3.5", "s", "6.0", "GB", "1.0", "kB"] in lines
    assert ["2", "tweets", "later", *["-"] * 5] in lines
    assert ["accuracy", "-"] in lines


def test_a_matrix_of_many_tasks_is_left_to_the_plot(store: Store) -> None:
    names = [f"task {number} of a name that is far too long for a terminal" for number in range(11)]
    fill_stream(store, rounds=0, tasks=[{"name": name, "rounds": 2} for name in names])
    text = call("show", RUN).stdout
    assert "The accuracy matrix has 11 tasks: fedtune runs plot stream-1a2b draws it." in text
    assert "before training" not in text


def test_a_reference_gives_the_intransigence(store: Store) -> None:
    fill_stream(store)
    joint = [(0.1, 0.1, 0.1), *[(0.95, 0.9, 0.9)] * 4]
    fill_stream(store, "joint-5e6f", rows=joint)
    assert ["intransigence", "towards", "joint-5e6f", "3.3"] in shown("show", RUN, "--reference", "joint")
    stream = json.loads(call("show", RUN, "--reference", "joint", "--json").stdout)["stream"]
    assert stream["figures"]["intransigence"] == pytest.approx((0.05 + 0.1 - 0.05) / 3)
    assert stream["reference"] == "joint-5e6f"


def test_a_plain_run_on_all_tasks_is_a_reference_too(store: Store) -> None:
    fill_stream(store)
    start(store, "plain-7a8b")
    scores = tuple(a_metric(0.9, "test", domain) for domain in ("films", "tweets", "all", "mean"))
    store.commit_round("plain-7a8b", a_round(1, metrics=(*scores, a_metric(0.2, "validation", "films"))))
    assert get_final_scores(store.run("plain"), store.rounds("plain-7a8b")) == {"films": 0.9, "tweets": 0.9}
    stream = json.loads(call("show", RUN, "--reference", "plain", "--json").stdout)["stream"]
    assert stream["figures"]["intransigence"] == pytest.approx((0.0 + 0.1) / 2)


def test_a_reference_that_cannot_serve_is_refused(store: Store) -> None:
    fill_stream(store)
    fill(store)
    with pytest.raises(StoreError, match="film-1a2b has no final accuracy of a task that run stream-1a2b has learned"):
        call("show", RUN, "--reference", "film")
    with pytest.raises(StoreError, match="film-1a2b has no stream of tasks; --reference is for runs that have one"):
        call("show", "film", "--reference", RUN)


def test_compare_puts_forgetting_learning_and_storage_side_by_side(store: Store) -> None:
    fill_stream(store)
    fill_stream(store, "stream-3c4d", rounds=4)
    fill(store)
    lines = shown("compare", RUN, "stream-3c4d", "film")
    assert ["accuracy,", "%", "73.3", "70.0", "-"] in lines
    assert ["forgetting,", "%", "15.0", "30.0", "-"] in lines
    assert ["learning,", "%", "88.3", "85.0", "-"] in lines
    assert ["on", "device", "8.0", "kB", "4.0", "kB", "-"] in lines
    assert not [line for line in lines if "Do" in line]


def test_compare_warns_when_only_some_runs_are_told_the_task(store: Store) -> None:
    fill_stream(store)
    fill_stream(store, "stream-3c4d", setting="task")
    assert "Do not compare these accuracies" in call("compare", RUN, "stream-3c4d").stdout


def test_export_has_tables_of_visits_and_scores(store: Store, tmp_path: Path) -> None:
    fill_stream(store, rounds=4)
    call("export", RUN, "-o", "out")
    visits: list[dict[str, Any]] = list(csv.DictReader((tmp_path / "out" / "tasks.csv").read_text().splitlines()))
    assert [(one["run_id"], one["visit"], one["name"], one["last_round"]) for one in visits] == [
        (RUN, "1", "films", "2"),
        (RUN, "2", "tweets", "4"),
    ]
    assert json.loads(visits[0]["labels"]) == ["no", "a b"]
    scores = list(csv.DictReader((tmp_path / "out" / "task_scores.csv").read_text().splitlines()))
    assert len(scores) == 4 + 8
    assert {one["moment"] for one in scores} == {"shared"}


def test_a_run_of_the_library_gives_matrix_and_figures(store: Store) -> None:
    fill_stream(store)
    fill(store)
    run = fedtune.Run(RUN, get_default_url())
    assert run.matrix is not None
    assert run.matrix.rows[2] == ROWS[2]
    assert run.stream_figures["forgetting"] == pytest.approx(0.15)
    assert run.to_arrow("tasks").num_rows == 4
    plain = fedtune.Run("film-1a2b", get_default_url())
    assert (plain.matrix, plain.stream_figures) == (None, {})
