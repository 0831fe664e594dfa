"""The ledger that a run keeps of its stream: visits, and each task's score by client and device class."""

import math
from typing import Any

import pytest
from flwr.app import MetricRecord

import fedtune
from fedtune import continual, paths
from fedtune.checkpoint import read_checkpoint
from fedtune.errors import ClientUpdateError
from fedtune.seeds import derive_seed
from fedtune.server.reports import read_report, read_score
from fedtune.tracking import Store, get_default_url
from fedtune.tracking.stream_ledger import list_visits, make_matrix, make_scope_matrices
from fedtune.training import RunContext, evaluate_model, get_run_context, set_model_state
from fedtune.training.holdout_split import split_holdout
from fedtune.training.stream_place import make_stream_round
from tests.federations import Ended, execute, outcome
from tests.streams import CLASSES, resolve_stream

pytestmark = pytest.mark.usefixtures("home")

HELD = {"local_holdout": 0.2, "clients": "all"}
PHONES = [{"name": "phone", "count": 1}, {"name": "tablet", "count": 3}]
FIVES = {"setting": "class", "tasks": {"size": 5, "rounds": 2}}


def test_a_round_commits_the_visits_that_it_begins_and_ends() -> None:
    ended = execute(resolve_stream(FIVES))
    assert [(one.visit, one.name, one.first_round, one.last_round) for one in list_visits(ended.rounds)] == [
        (1, "0+1+2+3+4", 1, 2),
        (2, "5+6+7+8+9", 3, 4),
    ]
    assert list_visits(ended.rounds)[1].labels == ("5", "6", "7", "8", "9")
    context = get_run_context(ended.run.recipe)
    numbers = continual.number_tasks(context.recipe, context.corpus.test, context.corpus.label_names)
    assert [one.test_examples for one in list_visits(ended.rounds)] == [int((numbers == task).sum()) for task in (0, 1)]
    matrix = make_matrix(ended.run, ended.rounds)
    assert matrix is not None
    assert [[score is not None for score in row] for row in matrix.rows] == [[True, False], [True, False], [True] * 2]
    assert all(record.task_scores == () for record in ended.rounds)


def test_late_clients_keep_a_visit_open_until_they_have_ended_it() -> None:
    ended = execute(resolve_stream({**FIVES, "arrival": {"staggered": 1, "waves": 2}}, evaluation=HELD))
    assert [(one.first_round, one.last_round) for one in list_visits(ended.rounds)] == [(1, 3), (3, 5)]
    # Clients 0 and 2 ended their last task in round 4, and still score the last model.
    assert {one.scope for one in ended.rounds[5].task_scores} >= {f"client:{number}" for number in range(4)}


def test_the_visits_of_a_late_client_end_when_it_ends_them() -> None:
    ended = execute(resolve_stream({**FIVES, "arrival": {"staggered": 1, "waves": 2}}, evaluation=HELD))
    told = {
        (one.scope, record.number - (one.moment == "before"), one.task): one.accuracy
        for record in reversed(ended.rounds)
        for one in record.task_scores
    }
    names = [one.name for one in list_visits(ended.rounds)]
    matrices = make_scope_matrices(ended.run, ended.rounds)
    for client, ends in ((0, (2, 4)), (1, (3, 5))):
        rows = [tuple(told.get((f"client:{client}", end, name)) for name in names) for end in ends]
        assert list(matrices[f"client:{client}"].rows[1:]) == rows
        assert None not in rows[0]  # the second task as the client met it, when it began


def score_by_hand(context: RunContext, ended: Ended, number: int, client: int, task: int) -> tuple[int, float]:
    """Score a checkpoint on what a client holds out of a task: examples and accuracy."""
    rows = context.client_rows[client]
    seed = derive_seed(context.recipe.seed, client, "own")
    held_out = split_holdout(rows[context.task_numbers[rows] == task], 0.2, seed)[1].tolist()
    checkpoint = ended.rounds[number].checkpoint
    assert checkpoint is not None
    set_model_state(context.model, read_checkpoint(paths.get_runs_folder() / checkpoint.path))
    with continual.mask_classes(context.model, range(5 if number < 3 else 10), 10):
        found = evaluate_model(context.evaluated_model, context.train, held_out)
    [accuracy] = [one.value for one in found if (one.domain, one.name) == ("all", "accuracy")]
    return len(held_out), accuracy


def test_each_client_scores_each_task_on_what_it_holds_out_of_it() -> None:
    ended = execute(resolve_stream(FIVES, evaluation=HELD, devices=PHONES, checkpoints={"keep": "all"}))
    context = get_run_context(ended.run.recipe)
    expected = {
        (number, client, task): score_by_hand(context, ended, number, client, task)
        for number, tasks in ((2, 1), (4, 2))
        for client in range(4)
        for task in range(tasks)
    }
    names = [task.name for task in context.recipe.stream.tasks]  # type: ignore[union-attr]
    found = {
        (number, int(one.scope.removeprefix("client:")), names.index(one.task)): (one.num_predictions, one.accuracy)
        for number in (2, 4)
        for one in ended.rounds[number].task_scores
        if one.scope.startswith("client:") and one.moment == "shared"
    }
    assert found == expected
    # In the first round of a visit clients score the model they get: that of the border.
    before = [one for one in ended.rounds[3].task_scores if (one.scope, one.moment) == ("client:1", "before")]
    assert [(one.task, one.num_predictions) for one in before] == [
        (names[0], expected[2, 1, 0][0]),
        (names[1], expected[4, 1, 1][0]),
    ]
    tablets = [expected[4, client, 0] for client in (1, 2, 3)]
    [tablet] = [
        one
        for one in ended.rounds[4].task_scores
        if (one.scope, one.moment, one.task) == ("class:tablet", "shared", names[0])
    ]
    total = sum(count for count, _ in tablets)
    assert tablet.num_predictions == total
    assert tablet.accuracy == pytest.approx(sum(count * value for count, value in tablets) / total)
    matrices = make_scope_matrices(ended.run, ended.rounds)
    assert matrices["client:2"].rows[2] == (expected[4, 2, 0][1], expected[4, 2, 1][1])


def test_the_ledger_of_clients_changes_no_bit_of_the_run() -> None:
    plain = execute(resolve_stream(FIVES, evaluation={"local_holdout": 0.2}))
    whole = execute(resolve_stream(FIVES, evaluation=HELD), run="run-2")
    assert whole.hashes == plain.hashes


def test_nothing_is_told_of_a_task_with_few_held_out_examples() -> None:
    context = get_run_context(resolve_stream(CLASSES, evaluation={"local_holdout": 0.5}).model_dump_json())
    rows = context.client_rows[0]
    few = [row for row in rows if context.task_numbers[row] == 0][:9]  # of which 4 are held out
    others = [row for row in rows if context.task_numbers[row] == 1][:10]  # of which 5 are
    stream = make_stream_round(context, rows[[row in {*few, *others} for row in rows]], 2, 0)
    assert stream is not None
    assert [(one.task, len(one.rows)) for one in stream.holdouts] == [(1, 5)]


def test_with_the_task_known_held_out_examples_are_told_apart_within_it() -> None:
    ended = execute(resolve_stream({**CLASSES, "setting": "task"}, evaluation=HELD))
    last = {one.task: one.accuracy for one in ended.rounds[5].task_scores if one.scope == "client:0"}
    assert len(last) == 5
    assert min(last.values()) > 0.7  # among ten classes the first task would be forgotten


GOOD: dict[str, Any] = {
    "num_examples": 5,
    "loss": 0.5,
    "seconds": 1.0,
    "activation_memory": 0,
    "peak_memory": 9,
    "num_holdout_predictions": 0,
    "holdout_loss": 0.0,
    "holdout_accuracy": 0.0,
    "extra_holdout_metrics": [],
    "trained_holdout_metrics": [],
}
TASKS: dict[str, Any] = {
    "task_predictions": [7, 0],
    "task_accuracies": [0.5, 0.0],
    "task_losses": [0.25, 0.0],
    "stored_bytes": 100,
}


def test_scores_of_tasks_are_checked_before_they_are_believed() -> None:
    report = read_report(MetricRecord(GOOD | TASKS), num_tasks=2)
    assert report.task_figures is not None
    assert report.task_figures.list_reported() == [(0, 7, 0.5, 0.25)]
    assert read_report(MetricRecord(GOOD), num_tasks=2).task_figures is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"task_predictions": [-1, 0]},
        {"task_accuracies": [1.5, 0.0]},
        {"task_losses": [math.inf, 0.0]},
        {"task_losses": [0.25]},
        {"task_predictions": [7, 0, 0], "task_accuracies": [0.5, 0.0, 0.0], "task_losses": [0.25, 0.0, 0.0]},
        {"stored_bytes": -1},
    ],
)
def test_impossible_scores_of_tasks_are_refused(wrong: dict[str, Any]) -> None:
    for read, examples in ((read_report, 5), (read_score, 0)):
        with pytest.raises(ClientUpdateError, match="update the client"):
            read(MetricRecord(GOOD | TASKS | wrong | {"num_examples": examples}), num_tasks=2)


def test_scores_of_tasks_are_refused_in_a_run_without_a_stream() -> None:
    with pytest.raises(ClientUpdateError, match="its report has scores of 2 tasks, and the stream has 0"):
        read_report(MetricRecord(GOOD | TASKS))


def test_a_run_that_was_rolled_back_ends_with_the_same_ledger() -> None:
    whole = execute(resolve_stream(FIVES, evaluation=HELD, checkpoints={"keep": "all"}))
    with Store.open() as store:
        store.forget_rounds("run-1", 1, "rolled back")
    fedtune.simulate(fedtune.Run("run-1", get_default_url()))
    again = outcome("run-1")
    assert [record.task_scores for record in again.rounds] == [record.task_scores for record in whole.rounds]
    assert list_visits(again.rounds) == list_visits(whole.rounds)


def test_what_devices_store_is_recorded_in_bytes() -> None:
    ended = execute(resolve_stream({**FIVES, "memory": [{"replay": {"share": "10%"}}]}))
    stored = {one.client: one.stored_bytes for one in ended.rounds[4].client_records}
    own = paths.get_runs_folder() / "run-1" / "own"
    on_disk = {
        client: sum(file.stat().st_size for file in own.glob(f"client-{client:06d}/memory-*")) for client in range(4)
    }
    assert stored == on_disk
    assert min(on_disk.values()) > 1000
    assert {one.stored_bytes for one in execute(resolve_stream(CLASSES), run="naive").rounds[1].client_records} == {0}
