"""Simulated streams that are merged at the end of each task: what is sent and remembered, and that runs stay runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedtune import checkpoint, paths
from fedtune.continual import build_border_methods
from fedtune.continual._border_sums import average_sums
from fedtune.continual._tensor_groups import select_group
from fedtune.merging import measure_activation_statistics
from fedtune.recipe.schema import Unit
from fedtune.training import get_run_context
from tests.federations import Ended, execute
from tests.streams import check_killed_run, list_memory, resolve_stream

pytestmark = pytest.mark.usefixtures("home")

TASKS = [{"name": f"t{k}", "where": [str(2 * k), str(2 * k + 1)], "rounds": 2} for k in range(3)]
STREAM = {"setting": "class", "tasks": TASKS}


def run(*steps: Any, name: str = "run", **changes: Any) -> Ended:
    return execute(
        resolve_stream({**STREAM, "consolidate": list(steps)}, checkpoints={"keep": "all"}, **changes), run=name
    )


def read_state(ended: Ended, number: int) -> Mapping[str, Tensor]:
    found = ended.rounds[number].checkpoint
    assert found is not None
    return checkpoint.read_checkpoint(paths.get_runs_folder() / found.path, found.sha256)


def read_memory(ended: Ended, number: int) -> dict[str, Tensor]:
    found = ended.rounds[number].checkpoint
    assert found is not None
    file = checkpoint.get_memory_path(paths.get_runs_folder() / found.path)
    return checkpoint.read_checkpoint(file, found.memory_sha256)


def is_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("step", [{"aim": {"omega": 1.0}}, {"shrink": {"factor": 1.0}}, {"average": {"share": 1.0}}])
def test_steps_that_keep_everything_are_the_naive_stream_bit_for_bit(step: Any) -> None:
    naive, kept = run(name="naive"), run(step, name="kept")
    assert all(is_equal(read_state(naive, number), read_state(kept, number)) for number in range(7))


def test_a_border_puts_the_state_between_its_ends_and_keeps_rows_of_new_classes() -> None:
    naive, half = run(name="naive"), run({"shrink": {"factor": 0.5}}, name="half")
    assert is_equal(read_state(naive, 3), read_state(half, 3))  # the first border, and a round after it
    before, plain, found = read_state(naive, 2), read_state(naive, 4), read_state(half, 4)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor[:2], before[name][:2].lerp(plain[name][:2], 0.5))
        assert torch.equal(tensor[2:], plain[name][2:])


def test_clients_send_sums_once_per_task_and_the_server_adds_those_of_their_pooled_examples() -> None:
    recipe = resolve_stream({**STREAM, "consolidate": [{"aim": {"omega": 0.0, "max_examples": None}}]})
    ended, context = execute(recipe), get_run_context(recipe.model_dump_json())
    plain = execute(resolve_stream(STREAM), run="plain")
    sent = [[one.bytes_up for one in record.client_records] for record in ended.rounds]
    plainly = [[one.bytes_up for one in record.client_records] for record in plain.rounds]
    assert [one == other for one, other in zip(sent, plainly, strict=True)] == [
        True,
        True,
        False,
        True,
        False,
        True,
        False,
    ]
    sums = select_group(read_memory(ended, 6), "consolidate/sums")
    found = average_sums(context.model, sums, list(read_last_state(ended)))
    rows = [row for row in range(len(context.train)) if context.task_numbers[row] in (0, 1, 2)]
    wanted = measure_activation_statistics(context.model, [context.train.make_batch(rows)])
    for name, statistics in found.items():
        torch.testing.assert_close(statistics.mean_abs, wanted[name].mean_abs, rtol=1e-5, atol=1e-7)


def read_last_state(ended: Ended) -> Mapping[str, Tensor]:
    return read_state(ended, len(ended.rounds) - 1)


def test_fisher_weights_both_ends_by_sums_over_examples() -> None:
    naive, fisher = run(name="naive"), run("fisher", name="fisher")
    earlier, both = (select_group(read_memory(fisher, number), "consolidate/sums") for number in (2, 4))
    before, plain, found = read_state(naive, 2), read_state(naive, 4), read_state(fisher, 4)
    for name, tensor in found.items():
        newest = both[name] - earlier[name]
        total = both[name].where(both[name] > 0, 1.0)
        wanted = (earlier[name] * before[name] + newest * plain[name]) / total
        known = both[name][:2] > 0
        torch.testing.assert_close(tensor[:2][known], wanted[:2][known].float(), rtol=1e-4, atol=1e-6)
        assert torch.equal(tensor[2:], plain[name][2:])


def read_accuracy(ended: Ended, number: int) -> float:
    metrics = ended.rounds[number].metrics
    [found] = [one.value for one in metrics if (one.split, one.domain, one.name) == ("border", "mean", "accuracy")]
    return found


@pytest.mark.parametrize("begin", ["independent", "sequential"])
def test_experts_keep_more_than_the_naive_stream(begin: str) -> None:
    naive, experts = run(name="naive"), run({"experts": {"start": begin}}, name="experts")
    assert read_accuracy(experts, 6) > read_accuracy(naive, 6) + 0.1
    first, second = read_state(experts, 0 if begin == "independent" else 2), read_state(experts, 3)
    [weight] = [name for name in first if first[name].dim() == 2]
    assert torch.equal(first[weight][4:], second[weight][4:])  # a round of the second task moves classes 0 to 3
    assert torch.equal(read_state(naive, 2)[weight], read_state(experts, 2)[weight])


def test_an_independent_expert_is_trained_from_the_state_before_any_training() -> None:
    """As a stream that has this task alone, since seeds do not depend on the task."""
    experts = run({"experts": {"start": "independent"}}, name="experts", seed=3)
    memory = select_group(read_memory(experts, 4), "experts")
    begin = read_state(experts, 0)
    two = {name: begin[name] + tensor for name, tensor in select_group(memory, "task-0001").items()}
    [weight] = [name for name in begin if begin[name].dim() == 2]
    assert torch.equal(two[weight][4:], begin[weight][4:])
    one = {name: begin[name] + tensor for name, tensor in select_group(memory, "task-0000").items()}
    assert torch.equal(one[weight][2:], begin[weight][2:])
    assert not torch.equal(two[weight][:2], one[weight][:2])


def test_no_memory_reaches_a_device() -> None:
    naive, experts = run(name="naive"), run("experts", name="experts")
    received = [[one.bytes_down for one in record.client_records] for record in (*naive.rounds, *experts.rounds)]
    assert received[:7] == received[7:]


@pytest.mark.parametrize("step", ["aim", "fisher", {"experts": {"start": "sequential", "merge": ["magmax"]}}])
def test_a_run_killed_at_a_border_resumes_with_the_same_bits(tmp_path: Path, step: Any) -> None:
    alone = check_killed_run(tmp_path, "before the rename", {**STREAM, "consolidate": [step]})
    assert any(list_memory(alone))


def test_a_task_that_comes_again_counts_once() -> None:
    tasks = [*TASKS[:2], {"name": "t0", "rounds": 1}]
    recipe = resolve_stream({**STREAM, "tasks": tasks, "consolidate": ["aim"]}, checkpoints={"keep": "all"})
    ended = execute(recipe)
    assert is_equal(read_memory(ended, 4), read_memory(ended, 5))
    assert read_memory(ended, 5)["consolidate/counted"].tolist() == [0, 1]


def test_the_recipe_writes_every_setting_out() -> None:
    recipe = resolve_stream({**STREAM, "consolidate": ["average", "aim"]})
    assert recipe.stream is not None
    aim, average = recipe.stream.consolidate
    assert aim.settings["measured_by"] == "clients"
    assert average == Unit(name="average", settings={"share": "tasks"})
    assert resolve_again(recipe.stream.consolidate) == ["consolidate", "average"]


def resolve_again(units: list[Unit]) -> list[str]:
    return [method.name for method in build_border_methods(units)]
