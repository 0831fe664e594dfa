"""Experts: task vectors and their merge, each class's own row of the head, and where training starts."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedtune.continual import Border, StreamPlan, list_classes
from fedtune.continual._consolidation_method import Consolidation
from fedtune.continual._task_vectors import compute_task_vector, merge_task_vectors
from fedtune.continual.average import Average
from fedtune.continual.experts import Experts
from fedtune.merging import build_pipeline
from fedtune.recipe.schema import Unit
from tests.streams import CLASSES, make_stream_recipe

LABELS = [str(number) for number in range(10)]


def drawn(seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {"0.weight": torch.randn(4, 3, generator=random), "1.weight": torch.randn(10, 4, generator=random)}


START = drawn(0)
ENDS = [{name: START[name] + 0.1 * tensor for name, tensor in drawn(seed).items()} for seed in (1, 2, 3)]


def walk(method: Experts | Average, stream: Mapping[str, Any] = CLASSES) -> list[Border]:
    """The borders of a stream whose tasks end at ``ENDS``, and one more with what the last one left."""
    recipe, memory, state = make_stream_recipe(listed(stream)), dict[str, Tensor](), dict(START)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 10, bias=False))
    plan, found = StreamPlan(recipe), list[Border]()
    for visit, end in enumerate(ENDS):
        border = Border(recipe, model, visit, plan.find_task(visit), visit + 1, START, state, end, memory, [], LABELS)
        state, memory = (dict(one) for one in method.after_task(border))
        found.append(border)
    return [*found, Border(recipe, model, 3, 0, 4, START, state, state, memory, [], LABELS)]


def listed(stream: Mapping[str, Any]) -> dict[str, Any]:
    """The stream with its tasks written out: pairs of digits."""
    tasks = [{"name": f"t{k}", "where": [str(2 * k), str(2 * k + 1)], "rounds": 1} for k in range(5)]
    return {**stream, "tasks": tasks}


DOMAINS = {"setting": "domain", "by": "place"}


@pytest.mark.parametrize("name", ["mean", "ties", "magmax", "opcm", "dare-linear"])
def test_the_model_is_the_start_plus_the_merge_of_all_vectors(name: str) -> None:
    left = walk(Experts(merge=[Unit(name=name)]), DOMAINS)[-1]
    vectors = [compute_task_vector(START, end) for end in ENDS]
    wanted = merge_task_vectors(build_pipeline([Unit(name=name)]), START, vectors, 3)
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in left.before.items())


def test_the_mean_of_experts_is_the_mean_of_their_ends() -> None:
    left = walk(Experts(), DOMAINS)[-1]
    for name, tensor in left.before.items():
        torch.testing.assert_close(tensor, torch.stack([end[name] for end in ENDS]).mean(0))


def test_magmax_remembers_one_vector_and_others_one_per_task() -> None:
    one, all_of_them = (walk(Experts(merge=[Unit(name=name)]), DOMAINS)[-1].memory for name in ("magmax", "mean"))
    assert sorted(one) == ["task-0000/0.weight", "task-0000/1.weight"]
    assert len(all_of_them) == 6


def test_each_class_has_the_row_that_its_own_task_trained() -> None:
    borders = walk(Experts())
    for visit in (1, 2):
        after = borders[visit + 1].before
        for task in range(visit + 1):
            rows = list_classes(StreamPlan(borders[0].recipe), LABELS, [task])
            assert torch.equal(after["1.weight"][rows], ENDS[task]["1.weight"][rows])
        mean = torch.stack([end["0.weight"] for end in ENDS[: visit + 1]]).mean(0)
        torch.testing.assert_close(after["0.weight"], mean)


def test_the_first_expert_is_the_model() -> None:
    first = walk(Experts(merge=[Unit(name="magmax")]))[1].before
    assert all(torch.equal(tensor, ENDS[0][name]) for name, tensor in first.items())


def test_independent_experts_start_anew_and_sequential_ones_where_the_one_before_ended() -> None:
    state = drawn(7)
    assert Experts().start_task(START, state, walk(Experts())[-1].memory) is START
    method = Experts(start="sequential")
    begun = method.start_task(START, state, walk(method)[-1].memory)
    assert all(torch.equal(begun[name], ENDS[-1][name]) for name in START)


def test_a_task_that_comes_again_replaces_its_vector() -> None:
    border = walk(Experts(), DOMAINS)[-1]
    again = Border(border.recipe, border.model, 3, 0, 4, START, START, drawn(8), border.memory, [], LABELS)
    memory = Experts().after_task(again).memory
    assert memory.keys() == border.memory.keys()
    torch.testing.assert_close(memory["task-0000/0.weight"], drawn(8)["0.weight"] - START["0.weight"])


def test_the_average_is_the_mean_of_all_ends() -> None:
    """Where each task ended where it did, whatever the state it began with."""
    left = walk(Average(), DOMAINS)[-1].before
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, torch.stack([end[name] for end in ENDS]).mean(0))


def test_an_average_by_a_share_interpolates_and_keeps_rows_of_new_classes() -> None:
    borders = walk(Average(share=0.25))
    second = borders[2].before
    torch.testing.assert_close(second["0.weight"], ENDS[0]["0.weight"].lerp(ENDS[1]["0.weight"], 0.25))
    assert torch.equal(second["1.weight"][2:4], ENDS[1]["1.weight"][2:4])
    torch.testing.assert_close(second["1.weight"][:2], ENDS[0]["1.weight"][:2].lerp(ENDS[1]["1.weight"][:2], 0.25))


@pytest.mark.parametrize("name", ["aim", "fisher"])
def test_a_border_whose_round_failed_keeps_the_statistics_of_before(name: str) -> None:
    method = Consolidation(steps=(Unit(name=name),))
    sizes = {"0.weight": 4 if name == "aim" else (4, 3), "1.weight": 5 if name == "aim" else (10, 4)}
    memory = {f"sums/{key}": torch.ones(size, dtype=torch.float64) for key, size in sizes.items()}
    memory |= {"counted": torch.tensor([0])}
    border = walk(Average(), DOMAINS)[1]
    failed = Border(border.recipe, border.model, 1, 1, 2, START, ENDS[0], ENDS[0], memory, [], LABELS)
    result = method.after_task(failed)
    assert result.memory is memory
    assert all(torch.equal(result.state[key], ENDS[0][key]) for key in START)
