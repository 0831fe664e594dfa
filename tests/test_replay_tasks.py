"""Replay in other tasks and shapes of data: a stream of two places, one round each."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune import paths
from fedtune.errors import RecipeError
from fedtune.recipe.schema import Recipe
from fedtune.simulation import resolve_recipe
from fedtune.training import clear_run_context
from tests.federations import execute
from tests.task_cases import task_recipe

pytestmark = pytest.mark.usefixtures("home")

DOMAINS = {"keep": "domains", "share": 0.1}


def make_recipe(case: str, folder: Path, memory: list[Any], *overrides: str) -> Recipe:
    """The recipe of a case over two clients, whose rows are of two places in turn."""
    clear_run_context()
    settings = task_recipe(case, folder, *overrides, rows=90).model_dump(mode="json")
    file = folder / "data.jsonl"
    rows = [{**json.loads(line), "place": "ab"[row % 2]} for row, line in enumerate(file.read_text().splitlines())]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    settings["data"]["columns"]["domain"] = "place"
    tasks = [{"name": "a", "rounds": 1}, {"name": "b", "rounds": 1}]
    changes = {"federation": {}, "devices": [{"count": 2}]}
    stream = {"setting": "domain", "tasks": tasks, "memory": memory}
    return resolve_recipe(Recipe.model_validate({**settings, **changes, "stream": stream}))


@pytest.mark.parametrize(
    ("case", "memory", "overrides"),
    [
        ("text-generation", [{"replay": DOMAINS}], ("train.packing=best-fit",)),
        ("text-generation", [{"replay": DOMAINS}], ("data.tokens=disk",)),
        ("feature-extraction", [{"replay": DOMAINS}], ()),
        ("image-classification", ["der"], ("train.augmentation={horizontal_flip: true}",)),
        ("text-classification", ["der", "replay", "a-gem"], ("train.techniques=lora+gradient-checkpointing",)),
        ("text-classification", ["replay"], ("evaluation.local_holdout=0.3", "train.batch_size=200")),
    ],
)
def test_a_run_stores_and_uses_examples_of_both_places(
    tmp_path: Path, case: str, memory: list[Any], overrides: tuple[str, ...]
) -> None:
    recipe = make_recipe(case, tmp_path, memory, *overrides)
    kept = execute(recipe, run="kept")
    assert [one.status for record in kept.rounds[1:] for one in record.client_records] == ["merged"] * 4
    names = sorted(path.name for path in (paths.get_runs_folder() / "kept").rglob("memory-0*.safetensors"))
    assert names == ["memory-0000.safetensors"] * 2 + ["memory-0001.safetensors"] * 2
    assert recipe.stream is not None
    naive = recipe.model_copy(update={"stream": recipe.stream.model_copy(update={"memory": []})})
    hashes = execute(naive, run="naive").hashes
    assert kept.hashes[:2] == hashes[:2]
    assert kept.hashes[2] != hashes[2]


@pytest.mark.parametrize("case", ["text-generation", "text-classification, several"])
def test_examples_without_a_class_are_not_kept_by_class(case: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"replay keeps examples by class, but those of .* set keep: domains or keep"):
        make_recipe(case, tmp_path, ["replay"])
    with pytest.raises(RecipeError, match=r"der stores the logits of classes, but .* has none; use replay"):
        make_recipe(case, tmp_path, ["der"])
