"""Simulated runs of streams: what is trained, what is scored, and that a killed run resumes with the same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from fedtune import paths
from fedtune.checkpoint import read_checkpoint
from fedtune.errors import DataError, FedtuneError
from fedtune.recipe.yaml_file import parse_recipe
from fedtune.tracking.pruning import list_kept_rounds
from fedtune.training import ClientRound, get_run_context
from fedtune.training.stream_place import count_round_examples, make_stream_round
from fedtune.training.stream_training import compute_lr_progress
from tests.federations import TRIVIAL, Ended, execute
from tests.streams import CLASSES, check_killed_run, make_stream_recipe, resolve_stream

pytestmark = pytest.mark.usefixtures("home")


def read_border(ended: Ended, number: int) -> dict[str, float]:
    """The accuracies of the tasks on the test split after a round."""
    metrics = ended.rounds[number].metrics
    return {one.domain: one.value for one in metrics if (one.split, one.name) == ("border", "accuracy")}


def read_weight(ended: Ended, number: int) -> torch.Tensor:
    checkpoint = ended.rounds[number].checkpoint
    assert checkpoint is not None
    [weight] = [one for one in read_checkpoint(paths.get_runs_folder() / checkpoint.path).values() if one.dim() == 2]
    return weight


def test_a_class_stream_lists_its_tasks_and_never_moves_rows_of_classes_to_come() -> None:
    recipe = resolve_stream(CLASSES, checkpoints={"keep": "all"})
    assert recipe.federation.rounds == 5
    assert [task.name for task in recipe.stream.tasks] == ["0+1", "2+3", "4+5", "6+7", "8+9"]  # type: ignore[union-attr]
    ended = execute(recipe)
    start_weight = read_weight(ended, 0)
    for number in range(1, 6):
        weight = read_weight(ended, number)
        assert torch.equal(weight[2 * number :], start_weight[2 * number :])
        assert not torch.equal(weight[2 * number - 2 : 2 * number], start_weight[2 * number - 2 : 2 * number])
    assert [sorted(read_border(ended, number)) for number in (0, 2)] == [
        ["0+1", "all", "mean"],
        ["0+1", "2+3", "all", "mean"],
    ]
    last = read_border(ended, 5)
    assert last["8+9"] > 0.8
    assert last["0+1"] < 0.3  # nothing keeps the memory of the first task
    test = {one.domain: one.value for one in ended.rounds[5].metrics if (one.split, one.name) == ("test", "accuracy")}
    assert test == last


def test_with_the_task_known_each_task_is_told_apart_among_its_own_classes() -> None:
    ended = execute(resolve_stream({**CLASSES, "setting": "task"}))
    assert len(read_border(ended, 0)) == 7  # five tasks, all and mean: also those to come
    assert min(read_border(ended, 5).values()) > 0.8


def test_joint_training_has_all_tasks_from_the_first_round() -> None:
    ended = execute(resolve_stream({**CLASSES, "memory": ["joint"]}))
    assert len(read_border(ended, 1)) == 7
    naive = execute(resolve_stream(CLASSES), run="naive")
    assert read_border(ended, 5)["mean"] > read_border(naive, 5)["mean"] + 0.3


def test_the_learning_rate_starts_again_with_each_task() -> None:

    recipe = resolve_stream({**CLASSES, "tasks": {"size": 5, "rounds": 3}})
    context = get_run_context(recipe.model_dump_json())

    def progress(number: int, step: int) -> float:
        stream = make_stream_round(context, context.client_rows[0], number, 0)
        rows = context.client_rows[0]
        client = ClientRound(context.model, (), recipe, context.train, rows, number, 0, stream=stream)
        return compute_lr_progress(client, step, 2)

    assert [progress(number, 0) for number in (1, 2, 4, 6)] == [0, 1 / 3, 0, 2 / 3]
    assert progress(3, 1) == pytest.approx(5 / 6)


def test_every_client_has_examples_of_every_task_and_each_example_once() -> None:

    context = get_run_context(resolve_stream(CLASSES).model_dump_json())
    assert sorted(row for rows in context.client_rows for row in rows) == list(range(len(context.corpus.train)))
    assert all(set(context.task_numbers[rows]) == set(range(5)) for rows in context.client_rows)


def test_a_client_without_an_example_of_its_task_declines_and_the_round_goes_on() -> None:
    recipe = resolve_stream(
        CLASSES, data={"source": "sample:digits", "partition": {"kind": "shards", "shards_per_client": 1}}
    )
    ended = execute(recipe)
    declined = [one for record in ended.rounds for one in record.client_records if one.status == "declined"]
    assert {one.reason.split(" of task")[0] for one in declined} <= {"it has no example"}
    assert ended.run.status == "completed"


def test_staggered_clients_decline_before_their_first_task() -> None:
    ended = execute(resolve_stream({**CLASSES, "arrival": {"staggered": 1, "waves": 2}}))
    assert [one.status for one in ended.rounds[1].client_records] == ["merged", "declined", "merged", "declined"]
    assert "no task in this round" in ended.rounds[1].client_records[1].reason
    assert len(ended.rounds) == 7


@pytest.mark.parametrize("plant", ["half a checkpoint", "before the rename", "after the rename"])
def test_a_stream_killed_at_a_border_resumes_with_the_same_bits(tmp_path: Path, plant: str) -> None:
    check_killed_run(tmp_path, plant, CLASSES)


def test_the_states_at_the_newest_borders_are_kept() -> None:

    recipe = resolve_stream(
        {**CLASSES, "tasks": {"size": 5, "rounds": 4}}, checkpoints={"keep": {"last": 1, "best": False, "every": None}}
    )
    ended = execute(recipe)
    assert list_kept_rounds(ended.rounds) == [0, 4, 8]


def test_simulated_time_counts_the_examples_of_the_task() -> None:
    context = get_run_context(resolve_stream(CLASSES).model_dump_json())
    found = [count_round_examples(context, number) for number in range(1, 6)]
    assert [sum(own) for own in zip(*found, strict=True)] == [len(rows) for rows in context.client_rows]
    assert found[0] == [int((context.task_numbers[rows] == 0).sum()) for rows in context.client_rows]


def test_a_task_that_no_example_belongs_to_is_refused() -> None:
    recipe = resolve_stream(
        {"setting": "class", "tasks": [{"name": "0", "rounds": 1}, {"name": "eleven", "rounds": 1}]}
    )
    with pytest.raises(DataError, match="no training example belongs to eleven"):
        _ = get_run_context(recipe.model_dump_json()).client_rows


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {"tasks": [{"name": "0", "rounds": 1}, {"name": "x", "where": ["0"], "rounds": 1}]},
        {},
        "'0' belongs to 0 and to x",
    ),
    ({"tasks": [{"name": "0", "rounds": 1}, {"name": "0", "where": ["1"], "rounds": 1}]}, {}, "0 comes again"),
    ({"tasks": []}, {}, "at least one task"),
    ({"tasks": {"size": 2, "rounds": 1}}, {"federation": {"rounds": 3}}, "drop it"),
    ({"tasks": [{"name": "0", "rounds": 2}]}, {"federation": {"rounds": 3}}, "the tasks of the stream take 2"),
    ({"tasks": {"size": 2, "rounds": 1, "order": "alphabetical"}}, {}, "listed"),
    ({"by": "domain"}, {}, "a class stream goes by label"),
    ({"setting": "domain", "by": "label", "loss": "new"}, {}, "loss: new concerns the classes"),
    ({"setting": "time", "tasks": {"cut": ["1"], "rounds": 1}}, {}, "needs the column that orders"),
    ({"tasks": {"cut": ["1"], "rounds": 1}}, {}, "setting: time"),
    ({"tasks": [{"name": "mean", "rounds": 1}]}, {}, "as summaries are"),
    ({"memory": ["replai"]}, {}, "there is no 'replai'"),
    ({"memory": ["joint", "naive"]}, {}, "joint has all examples"),
    ({}, {"train": {"techniques": ["full"], "weight_decay": 0.1, "local_steps": 1}}, "weight_decay"),
    ({}, {"federation": {"asynchronous": {"buffer_size": 2}}}, "belongs to an earlier task"),
    (
        {"arrival": "own", "tasks": [{"name": "0", "rounds": 1}, {"name": "1", "rounds": 2}]},
        {},
        "equally many rounds for each task",
    ),
]


@pytest.mark.parametrize(("stream", "changes", "said"), BAD)
def test_a_stream_that_cannot_be_is_refused_in_a_sentence(
    stream: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises((FedtuneError, ValidationError), match=said):
        resolve_stream({**CLASSES, **stream}, **changes)


def test_a_recipe_without_a_stream_is_written_as_before() -> None:
    assert "stream" not in parse_recipe(TRIVIAL, "trivial", ()).model_dump_json()
    assert '"stream"' in make_stream_recipe(CLASSES).model_dump_json()
