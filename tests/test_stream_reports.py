"""Faults that users of other libraries of continual learning have reported, rebuilt as small recipes."""

from typing import Any

import pytest
import torch

from fedtune import paths
from fedtune.device.own_memory import MemoryFolder
from fedtune.errors import RecipeError
from fedtune.tracking.stream_figures import compute_figures
from fedtune.tracking.stream_ledger import make_matrix
from tests.federations import Ended, execute
from tests.streams import resolve_stream

pytestmark = pytest.mark.usefixtures("home")

TASKS = [{"name": f"t{k}", "where": [str(2 * k), str(2 * k + 1)], "rounds": 1} for k in range(2)]
TWO = {"setting": "class", "tasks": TASKS}
DEVICES = [{"name": "toy", "count": 2}]


def run(name: str = "run", **stream: Any) -> Ended:
    return execute(resolve_stream({**TWO, **stream}, devices=DEVICES), run=name)


def read_border(ended: Ended) -> dict[str, float]:
    return {
        one.domain: one.value for one in ended.rounds[-1].metrics if (one.split, one.name) == ("border", "accuracy")
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"memory": [{"ewc": {"strength": 1000.0}}]},  # Avalanche 1099: the penalty was always zero
        {"memory": ["lwf"], "setting": "task"},  # Avalanche 1121, 722: no old class was found in a head per task
    ],
    ids=["ewc", "lwf"],
)
def test_a_memory_changes_the_second_task_and_not_the_first(changes: dict[str, Any]) -> None:
    naive, kept = run("naive", **{**changes, "memory": []}), run("kept", **changes)
    assert kept.hashes[:2] == naive.hashes[:2]
    assert kept.hashes[2] != naive.hashes[2]


def test_logits_of_a_head_per_task_are_stored_and_used() -> None:
    """Avalanche 1657: the logits of some heads had other shapes."""
    ended = run(memory=[{"der": {"share": 1.0}}], setting="task")
    folder = paths.get_runs_folder() / "run" / "own" / "client-000000"
    stored = MemoryFolder(folder, "run").read_earlier(2)[1]
    known = stored["der/outputs"].isfinite()
    assert known.shape == (len(stored["der/groups"]), 10)
    for label, row in zip(stored["der/groups"].tolist(), known, strict=True):
        assert row.nonzero()[:, 0].tolist() == [label - label % 2, label - label % 2 + 1]
    assert min(read_border(ended).values()) > 0.5


def test_a_stream_of_one_task_ends_with_its_figures() -> None:
    """LAMDA-PILOT 15: all classes in the first task, and none after it."""
    ended = run(tasks={"size": 10, "rounds": 1}, memory=["ewc"], consolidate=[{"shrink": {"factor": 0.5}}])
    matrix = make_matrix(ended.run, ended.rounds)
    assert matrix is not None
    figures = compute_figures(matrix)
    assert figures["forgetting"] is None
    assert figures["accuracy"] == figures["learning"] == read_border(ended)["all"]


def test_a_buffer_of_all_examples_adds_no_step() -> None:
    """Avalanche 1274: an epoch was as long as the buffer."""
    naive, kept = run("naive"), run("kept", memory=[{"replay": {"share": 1.0}}])
    assert [[one.num_examples for one in record.client_records] for record in kept.rounds] == [
        [one.num_examples for one in record.client_records] for record in naive.rounds
    ]


def test_the_mean_of_the_stream_is_that_of_its_tasks() -> None:
    """Avalanche 1137: the average was not that of the lines above it."""
    border = read_border(run())
    assert border["mean"] == pytest.approx((border["t0"] + border["t1"]) / 2)


@pytest.mark.parametrize("changes", [{"setting": "task"}, {"loss": "new"}], ids=["task", "new"])
def test_joint_training_compares_all_labels_whatever_the_stream_compares(changes: dict[str, Any]) -> None:
    ended = run(memory=["joint"], **changes)
    assert [one.status for record in ended.rounds for one in record.client_records] == ["merged"] * 4
    assert all(torch.isfinite(torch.tensor(one.train_loss)) for one in ended.rounds[1].client_records)


@pytest.mark.parametrize("changes", [{"setting": "task"}, {"loss": "new"}], ids=["task", "new"])
def test_examples_that_come_with_a_neighbour_are_replayed_with_their_label(changes: dict[str, Any]) -> None:
    """Their label is one of the next task, which has not begun."""
    tasks = [*TASKS, {"name": "t2", "where": ["4", "5"], "rounds": 1}]
    ended = run(tasks=tasks, memory=[{"replay": {"share": 1.0}}], blur=0.5, **changes)
    assert [one.status for record in ended.rounds for one in record.client_records] == ["merged"] * 6


def test_a_first_task_of_one_class_learns_nothing_and_warns_of_nothing() -> None:
    one_by_one = [{"name": str(label), "rounds": 1} for label in range(2)]
    ended = run(tasks=one_by_one, memory=["ewc"])
    assert ended.hashes[0] == ended.hashes[1] != ended.hashes[2]
    assert ended.run.status == "completed"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": "new"}, "new compares only the labels of a task, and 0 has one, so its loss is zero"),
        ({"setting": "task"}, "0 has one label, so nothing is left to tell apart"),
    ],
)
def test_a_task_of_one_class_whose_loss_would_always_be_zero_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        resolve_stream({**TWO, "tasks": {"size": 1, "rounds": 1}, **changes})
