"""Experts: task vectors and their merge, each class's own row of the head, and where training starts."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from fedtune.continual import Border, ContinualMethod, StreamPlan, list_classes
from fedtune.continual._consolidation_method import Consolidation
from fedtune.continual._task_vectors import compute_task_vector, merge_task_vectors
from fedtune.continual.average import Average
from fedtune.continual.experts import Experts
from fedtune.errors import RecipeError
from fedtune.merging import build_pipeline
from fedtune.recipe.schema import Recipe, Unit
from fedtune.training.resolve import resolve_recipe
from tests.recipe_examples import TEXT
from tests.streams import CLASSES, make_stream_recipe, resolve_stream

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


@pytest.mark.parametrize(
    ("consolidate", "sentence"),
    [
        ([{"experts": {"merge": ["fisher"]}}], "^experts: fisher: the server has task vectors and nothing that was"),
        ([{"experts": {"merge": ["mean", "aim"]}}], "^experts: mean, aim: the server has task vectors and nothing"),
        ([{"experts": {"merge": ["fedit"]}}], "^experts: fedit: the server has task vectors"),
        (
            [{"experts": {"merge": ["slerp"]}}],
            "^experts: slerp takes 2 models, but the stream has 5 tasks; choose mean",
        ),
        (
            [{"experts": {"merge": ["trimmed-mean"]}}],
            "^experts: trimmed-mean needs 5 models, but after the second task",
        ),
        (["experts", "aim"], "experts replaces the state by a merge of all tasks; drop the other steps"),
        (["aim", "aim"], "aim, aim names one step twice; drop one"),
        (["naive"], "^stream.consolidate: naive does not merge at the end of a task; list it in stream.memory"),
    ],
)
def test_experts_that_cannot_be_merged_are_refused(consolidate: list[Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        resolve_stream({**listed(CLASSES), "consolidate": consolidate})


def test_experts_belong_to_the_border() -> None:
    with pytest.raises(
        RecipeError, match=r"^stream.memory: experts merges at the end of a task; list it in stream.con"
    ):
        resolve_stream({**listed(CLASSES), "memory": ["experts"]})


PAIRS = [{"lora": {"trained_factors": "both"}}]


@pytest.mark.parametrize("step", ["aim", "shrink", "average", "fisher", "experts"])
@pytest.mark.parametrize("techniques", [PAIRS, ["lora"]])
def test_pairs_that_change_from_task_to_task_are_refused(step: str, techniques: list[Any]) -> None:
    merge = ["fedit"] if techniques == PAIRS else ["mean"]
    with pytest.raises(
        RecipeError, match=f"^stream.consolidate: {step} merges changes of weights, but lora changes both"
    ):
        resolve_text(step, techniques, merge=merge)


def resolve_text(step: Any, techniques: list[Any], **changes: Any) -> Any:
    base = yaml.safe_load(TEXT)
    stream = {"setting": "domain", "by": "domain", "tasks": [{"name": name, "rounds": 1} for name in ("a", "b")]}
    return resolve_recipe(
        Recipe.model_validate(
            {
                **base,
                "federation": {},
                "train": {**base["train"], "techniques": techniques},
                "stream": {**stream, "consolidate": [step]},
                **changes,
            }
        )
    )


FROZEN = [{"lora": {"trained_factors": "b-only"}}]


def test_one_factor_with_a_common_other_is_shrunk_averaged_and_merged_by_mean() -> None:
    for step in ("average", {"shrink": {"factor": 0.5}}, "experts", "fisher"):
        resolve_text(step, FROZEN)


def test_qlora_is_consolidated_where_its_products_are_exact() -> None:
    resolve_text("average", [{"qlora": {"trained_factors": "b-only"}}])
    with pytest.raises(RecipeError, match=r"^stream.consolidate: average merges changes of weights, but qlora changes"):
        resolve_text("average", ["qlora"])


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        ("aim", "^stream.consolidate: aim scales columns of weights, but lora trains one factor"),
        ({"experts": {"merge": ["magmax"]}}, "experts with magmax depends on how a product is factored, but lora"),
        ({"experts": {"merge": ["opcm"]}}, "experts with opcm depends on how a product is factored, but lora"),
    ],
)
def test_what_acts_on_columns_or_entries_of_a_factor_is_refused(step: Any, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        resolve_text(step, FROZEN)


@pytest.mark.parametrize("step", ["aim", "average", "experts", "fisher", {"shrink": {"factor": 0.5}}])
@pytest.mark.parametrize("arrival", ["own", {"staggered": 1}])
def test_clients_must_end_tasks_together(step: Any, arrival: Any) -> None:
    name = step if isinstance(step, str) else "shrink"
    with pytest.raises(RecipeError, match=f"^stream.consolidate: {name} needs all clients to end a task in the same"):
        resolve_stream({**listed(CLASSES), "arrival": arrival, "consolidate": [step]})


@pytest.mark.parametrize("step", ["aim", "fisher"])
def test_statistics_and_privacy_do_not_go_together(step: str) -> None:
    privacy = {"noise_multiplier": 1.0, "clipping_norm": 1.0}
    with pytest.raises(RecipeError, match=f"^stream.consolidate: {step} sends statistics that privacy neither clips"):
        resolve_stream({**listed(CLASSES), "consolidate": [step]}, privacy=privacy)


@pytest.mark.parametrize("method", [Average(), Experts(), Consolidation(steps=(Unit(name="fisher"),))])
def test_pruning_and_consolidation_do_not_go_together(method: ContinualMethod) -> None:
    recipe = make_stream_recipe(CLASSES, train={"local_steps": 1, "techniques": ["dynamic-pruning"]})
    with pytest.raises(
        RecipeError, match=f"^stream.consolidate: {method.label} merges what tasks change, but dynamic-"
    ):
        method.check(recipe)


def test_nothing_is_consolidated_where_every_round_has_all_tasks() -> None:
    with pytest.raises(
        RecipeError, match=r"^stream.consolidate: joint trains on all tasks, so nothing is left to merge"
    ):
        resolve_stream({**listed(CLASSES), "memory": ["joint"], "consolidate": ["average"]})


def test_sums_of_different_models_do_not_add_up() -> None:
    devices = [{"name": "toy", "count": 3}, {"name": "small", "count": 1, "techniques": ["head-only"]}]
    recipe = make_stream_recipe(CLASSES, devices=devices)
    Average().check(recipe)
    with pytest.raises(RecipeError, match=r"^devices: small has techniques of its own, but the sums of fisher are"):
        Consolidation(steps=(Unit(name="fisher"),)).check(recipe)


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
