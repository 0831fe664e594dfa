"""Shapes that are easily forgotten: recurring tasks, numbers as labels, swapped files, clients that are not asked."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from benchmarks.ledger_count import count_client
from fedtune.continual._stored_rows import pack_examples
from fedtune.errors import StoreError
from fedtune.recipe.stream_settings import StreamTask, TimeCuts
from fedtune.recipe.yaml_text import load
from fedtune.tracking.stream_figures import compute_figures
from fedtune.tracking.stream_ledger import make_scope_matrices
from fedtune.training import get_run_context
from tests.federations import execute
from tests.replay_rounds import CLIENT, make_recipe, read_files, train_client
from tests.streams import resolve_stream

pytestmark = pytest.mark.usefixtures("home")

RECURRING = [
    {"name": "a", "where": ["0", "1"], "rounds": 1},
    {"name": "b", "where": ["2", "3"], "rounds": 1},
    {"name": "a", "rounds": 1},
]


def test_after_three_visits_a_buffer_holds_the_examples_of_all_and_each_once(tmp_path: Path) -> None:
    recipe = make_recipe({"replay": {"share": 1.0}}, tasks=RECURRING)
    train_client(recipe, tmp_path, 1, 2, 3)
    context = get_run_context(recipe.model_dump_json())
    rows = context.client_rows[CLIENT]
    expected = sorted(pack_examples(context.train, rows[context.task_numbers[rows] >= 0].tolist()))
    stored = read_files(tmp_path)[2]
    content, sizes = bytes(stored["replay/content"].numpy()), stored["replay/sizes"].tolist()
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    assert sorted(content[end - size : end] for end, size in zip(ends, sizes, strict=True)) == expected


def test_logits_of_a_first_visit_stay_those_of_its_time_when_the_task_comes_again(tmp_path: Path) -> None:
    train_client(make_recipe({"der": {"share": 1.0}}, tasks=RECURRING), tmp_path, 1, 2, 3)
    before, after = (pair_with_logits(read_files(tmp_path)[visit]) for visit in (1, 2))
    assert len(after) > len(before)  # the third visit reached others
    assert all(torch.equal(after[content], logits) for content, logits in before.items())


def pair_with_logits(stored: Mapping[str, Tensor]) -> dict[bytes, Tensor]:
    """The stored logits of each example."""
    contents = torch.split(stored["der/content"], stored["der/sizes"].tolist())
    return {bytes(one.numpy()): row for one, row in zip(contents, stored["der/outputs"], strict=True)}


@pytest.mark.parametrize("encrypted", [False, True])
def test_memory_files_that_two_devices_swapped_are_refused(tmp_path: Path, encrypted: bool) -> None:
    recipe = make_recipe("replay", own_memory={"encrypted": encrypted})
    one, other = (tmp_path / name / "own" / "run" for name in ("one", "other"))
    for folder in (one, other):
        train_client(recipe, folder, 1)
    name = "memory-0000.safetensors"
    os.replace(one / name, tmp_path / "kept")
    os.replace(other / name, one / name)
    os.replace(tmp_path / "kept", other / name)
    for folder in (one, other):
        with pytest.raises(StoreError, match=r"memory-0000.*; delete it to start this run's memory anew"):
            train_client(recipe, folder, 3)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{name: 0, where: [0, 1.5, 2024-01-31], rounds: 1}", ("0", ["0", "1.5", "2024-01-31"])),
        ("{name: old, where: [b], rounds: 1}", ("old", ["b"])),
    ],
)
def test_numbers_and_dates_of_yaml_are_values_of_tasks(written: str, expected: tuple[str, list[str]]) -> None:
    task = StreamTask.model_validate(load(written))
    assert (task.name, task.where) == expected


def test_cuts_may_be_years_or_dates_and_a_word_that_yaml_reads_as_no_is_told() -> None:
    assert TimeCuts.model_validate(load("{cut: [2020, 2021-06-01], rounds: 1}")).cut == ["2020", "2021-06-01"]
    with pytest.raises(ValidationError, match="YAML reads it as true or false; put it in quotes"):
        StreamTask.model_validate(load("{name: a, where: [no, yes], rounds: 1}"))


@pytest.mark.parametrize(
    "changes",
    [
        {"federation": {"clients_per_round": 2}},
        {"arrival": {"staggered": 1, "waves": 2}},
        {"tasks": [*RECURRING[:2], {"name": "a", "rounds": 2}], "federation": {"clients_per_round": 3}},
    ],
    ids=["sampled", "staggered", "recurring"],
)
def test_the_ledger_of_each_client_is_that_of_a_hand_count(home: Path, changes: dict[str, Any]) -> None:
    stream = {"setting": "class", "tasks": {"size": 5, "rounds": 3}, **changes}
    federation = stream.pop("federation", {})
    recipe = resolve_stream(stream, federation=federation, evaluation={"local_holdout": 0.3})
    ended = execute(recipe)
    matrices = make_scope_matrices(ended.run, ended.rounds)
    for client in range(4):
        counted, matrix = count_client(home / "store.sqlite", "run-1", client), matrices[f"client:{client}"]
        assert [list(row) for row in matrix.rows] == counted.matrix
        figures = compute_figures(matrix)
        assert {name: figures[name] for name in counted.figures} == pytest.approx(counted.figures)
        assert None not in counted.matrix[-1]  # asked after the last round, though evaluation.clients is not set


def test_a_sampled_client_scores_in_the_first_round_that_asks_it() -> None:
    stream = {"setting": "class", "tasks": {"size": 5, "rounds": 4}}
    recipe = resolve_stream(stream, federation={"clients_per_round": 1}, evaluation={"local_holdout": 0.3})
    ended = execute(recipe)
    asked = {number: one.client for number, record in enumerate(ended.rounds) for one in record.client_records}
    for number, client in asked.items():
        told = {one.scope for one in ended.rounds[number].task_scores if one.moment == "before"}
        assert f"client:{client}" in told
