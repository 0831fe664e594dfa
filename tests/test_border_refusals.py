"""Refusals of merges at the end of a task, each with one sentence."""

from typing import Any

import pytest
import yaml

from fedtune.continual import ContinualMethod
from fedtune.continual._consolidation_method import Consolidation
from fedtune.continual.average import Average
from fedtune.continual.experts import Experts
from fedtune.errors import RecipeError
from fedtune.recipe.schema import Recipe, Unit
from fedtune.training.resolve import resolve_recipe
from tests.recipe_examples import TEXT
from tests.streams import CLASSES, make_stream_recipe, resolve_stream

TASKS = [{"name": f"t{k}", "where": [str(2 * k), str(2 * k + 1)], "rounds": 1} for k in range(5)]
LISTED = {**CLASSES, "tasks": TASKS}


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
        resolve_stream({**LISTED, "consolidate": consolidate})


def test_experts_belong_to_the_border() -> None:
    with pytest.raises(
        RecipeError, match=r"^stream.memory: experts merges at the end of a task; list it in stream.con"
    ):
        resolve_stream({**LISTED, "memory": ["experts"]})


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
        resolve_stream({**LISTED, "arrival": arrival, "consolidate": [step]})


@pytest.mark.parametrize("step", ["aim", "fisher"])
def test_statistics_and_privacy_do_not_go_together(step: str) -> None:
    privacy = {"noise_multiplier": 1.0, "clipping_norm": 1.0}
    with pytest.raises(RecipeError, match=f"^stream.consolidate: {step} sends statistics that privacy neither clips"):
        resolve_stream({**LISTED, "consolidate": [step]}, privacy=privacy)


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
        resolve_stream({**LISTED, "memory": ["joint"], "consolidate": ["average"]})


def test_sums_of_different_models_do_not_add_up() -> None:
    devices = [{"name": "toy", "count": 3}, {"name": "small", "count": 1, "techniques": ["head-only"]}]
    recipe = make_stream_recipe(CLASSES, devices=devices)
    Average().check(recipe)
    with pytest.raises(RecipeError, match=r"^devices: small has techniques of its own, but the sums of fisher are"):
        Consolidation(steps=(Unit(name="fisher"),)).check(recipe)
