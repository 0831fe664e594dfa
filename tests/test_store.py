"""What goes into the store comes out of it, whole, in order, and only once."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine, event

from fedtune.errors import StoreError
from fedtune.tracking import Store, claim_run, new_run_id
from tests.store_examples import a_client_record, a_metric, a_round, fill, start


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    with Store.open() as opened:
        yield opened


@contextmanager
def counted() -> Iterator[list[str]]:
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    yield statements
    event.remove(Engine, "before_cursor_execute", note)


def test_rounds_come_back_as_they_were_committed(store: Store) -> None:
    recorded = fill(store)
    assert store.rounds("film-1a2b") == recorded


def test_a_round_without_checkpoint_metrics_or_contributions_comes_back(store: Store) -> None:
    start(store)
    bare = a_round(1, status="failed", reason="no reply", client_records=(), metrics=(), checkpoint=None)
    store.commit_round("film-1a2b", bare)
    assert store.rounds("film-1a2b") == [bare]


def test_a_run_comes_back_with_its_moments_in_utc(store: Store) -> None:
    before = datetime.now(UTC)
    fill(store, seed=2**63 - 1, recipe='{"name": "é"}')
    run = store.run("film-1a2b")
    assert (run.seed, run.recipe, run.engine, run.rounds_planned) == (2**63 - 1, '{"name": "é"}', "in-process", 3)
    assert run.finished_at is not None
    assert before <= run.created_at <= run.finished_at <= datetime.now(UTC)
    assert run.created_at.utcoffset() == run.finished_at.utcoffset() == UTC.utcoffset(None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 5e-324, 0.1 + 0.2])
def test_every_float_survives(store: Store, value: float) -> None:
    start(store)
    odd = a_round(
        1, metrics=(a_metric(value),), client_records=(a_client_record(0, train_loss=value, update_norm=value),)
    )
    store.commit_round("film-1a2b", odd)
    [found] = store.rounds("film-1a2b")
    assert [repr(found.metrics[0].value), repr(found.client_records[0].train_loss)] == [repr(value)] * 2


def test_a_float_of_numpy_is_kept_as_a_number(store: Store) -> None:
    start(store)
    store.commit_round("film-1a2b", a_round(1, metrics=(a_metric(np.float32(0.25)),)))  # type: ignore[arg-type]
    assert store.rounds("film-1a2b")[0].metrics == (a_metric(0.25),)


def test_only_completed_rounds_of_training_count_as_completed(store: Store) -> None:
    start(store)
    for record in (a_round(0), a_round(1), a_round(2, status="failed", reason="no quorum"), a_round(3)):
        store.commit_round("film-1a2b", record)
    assert store.run("film-1a2b").rounds_completed == 2


def test_a_round_is_recorded_once(store: Store) -> None:
    start(store)
    store.commit_round("film-1a2b", a_round(1))
    with pytest.raises(StoreError, match="round 1 of run film-1a2b is recorded already"):
        store.commit_round("film-1a2b", a_round(1))
    assert store.rounds("film-1a2b") == [a_round(1)]


def test_a_round_that_cannot_be_written_whole_is_not_written_at_all(store: Store) -> None:
    start(store)
    twice = a_round(1, metrics=(a_metric(0.5), a_metric(0.6)))
    with pytest.raises(StoreError):
        store.commit_round("film-1a2b", twice)
    assert store.rounds("film-1a2b") == []
    store.commit_round("film-1a2b", a_round(1))
    assert store.rounds("film-1a2b") == [a_round(1)]


def test_an_id_is_given_once(store: Store) -> None:
    start(store)
    with pytest.raises(StoreError, match="a run film-1a2b already"):
        start(store)


def test_runs_are_listed_newest_first_and_the_newest_is_the_latest(store: Store) -> None:
    for run_id in ("b", "c", "a"):
        start(store, run_id)
        time.sleep(0.002)
    assert [run.id for run in store.runs()] == ["a", "c", "b"]
    assert store.run("latest").id == "a"


def test_the_beginning_of_an_id_is_enough_unless_it_is_ambiguous(store: Store) -> None:
    for run_id in ("film-1a2b", "film-1a", "tweets-77", "a_c", "abc"):
        start(store, run_id)
    assert store.run("tw").id == "tweets-77"
    assert store.run("film-1a").id == "film-1a"
    assert store.run("a_").id == "a_c"
    with pytest.raises(StoreError, match=r"several runs begin with 'film': (film-1a, film-1a2b|film-1a2b, film-1a);"):
        store.run("film")


def test_an_unknown_run_is_refused_naming_the_nearest(store: Store) -> None:
    with pytest.raises(StoreError, match="holds no run yet"):
        store.run("latest")
    for run_id in ("film-1a2b", "digits-9"):
        start(store, run_id)
    with pytest.raises(StoreError, match=r"there is no run 'filn-1a2b'; the nearest are film-1a2b$"):
        store.run("filn-1a2b")
    with pytest.raises(StoreError, match="no run ''"):
        store.run("")


@pytest.mark.parametrize("call", ["commit_round", "finish", "reopen", "delete"])
def test_writing_to_an_unknown_run_is_refused(store: Store, call: str) -> None:
    start(store)
    rest = {"commit_round": (a_round(1),), "finish": ("completed",)}.get(call, ())
    with pytest.raises(StoreError, match="there is no run 'film'"):
        getattr(store, call)("film", *rest)


def test_deleting_a_run_takes_its_rows_along_and_leaves_the_others(store: Store) -> None:
    fill(store, "one")
    kept = fill(store, "two")
    store.delete("one")
    assert [run.id for run in store.runs()] == ["two"]
    start(store, "one")
    assert store.rounds("one") == []
    assert store.rounds("two") == kept


def test_a_failed_run_can_be_reopened_and_a_completed_one_cannot(store: Store) -> None:
    start(store)
    store.finish("film-1a2b", "failed", "no quorum")
    assert (store.run("latest").status, store.run("latest").reason) == ("failed", "no quorum")
    store.reopen("film-1a2b")
    with claim_run("film-1a2b"):
        run = store.run("latest")
    assert (run.status, run.reason, run.finished_at) == ("running", "", None)
    store.finish("film-1a2b", "completed")
    with pytest.raises(StoreError, match="is completed; there is nothing to resume"):
        store.reopen("film-1a2b")


def test_a_running_run_reads_as_interrupted_once_nobody_owns_it(store: Store) -> None:
    start(store)
    with claim_run("film-1a2b"):
        assert [store.run("latest").status, store.runs()[0].status] == ["running", "running"]
    assert [store.run("latest").status, store.runs()[0].status] == ["interrupted", "interrupted"]
    store.finish("film-1a2b", "completed")
    assert store.run("latest").status == "completed"


def test_the_number_of_queries_does_not_grow_with_the_number_of_runs(store: Store) -> None:
    def queries() -> int:
        with counted() as statements:
            store.rounds_of(run.id for run in store.runs())
        return len(statements)

    fill(store, "one")
    few = queries()
    for index in range(8):
        fill(store, f"more-{index}")
    assert queries() == few


def test_rounds_of_several_runs_are_kept_apart(store: Store) -> None:
    one, two = fill(store, "one", rounds=1), fill(store, "two", rounds=2)
    start(store, "empty")
    assert store.rounds_of(["two", "empty", "one"]) == {"two": two, "empty": [], "one": one}


def test_newest_scores_are_the_last_of_each_held_out_metric_over_all_domains(store: Store) -> None:
    start(store)
    start(store, "empty")
    fill(store, "other", rounds=1)
    last = (a_metric(0.7), a_metric(0.1, domain="film"), a_metric(9.0, "train", name="loss"))
    for record in (a_round(0, metrics=(a_metric(0.4, "test"),)), a_round(1), a_round(2, metrics=last)):
        store.commit_round("film-1a2b", record)
    found = store.get_latest_metrics()
    assert sorted(found["film-1a2b"]) == [(0, a_metric(0.4, "test")), (2, a_metric(0.7))]
    assert found["other"] == [(1, a_metric(0.65))]
    assert "empty" not in found


def test_closing_the_store_leaves_one_whole_file(store: Store, tmp_path: Path) -> None:
    fill(store)
    store.close()
    beside = {path.name for path in (tmp_path / "home").iterdir()}
    assert beside == {"store.sqlite", "store.sqlite.lock"}


@pytest.mark.parametrize("length", [1, 20, 57, 58, 64])
def test_the_id_of_a_run_fits_its_column_however_long_the_recipes_name_is(length: int) -> None:
    name = "n" * length
    one, other = new_run_id(name), new_run_id(name)
    assert one != other
    assert len(one) <= 64
    assert one[:-7] == name[:57]


def test_an_id_that_only_sqlite_would_take_is_refused(home: Path) -> None:
    with Store.open() as store:
        start(store, "r" * 64)
        with pytest.raises(StoreError, match=r"has 65 characters; choose one of at most 64"):
            start(store, "r" * 65)
