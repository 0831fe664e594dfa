"""``fedtune recipe upgrade``: a file of version 1 in the words of version 2, with its comments, order and layout."""

import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from fedtune.cli.main import cli
from fedtune.errors import RecipeError
from fedtune.recipe.schema import Recipe
from fedtune.recipe.upgrade import upgrade_recipe_text
from fedtune.recipe.versions import needs_translation, translate_recipe
from fedtune.recipe.yaml_file import parse_recipe, read_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
OLD = sorted((Path(__file__).parent / "fixtures" / "recipes-v1").glob("*.yaml"))

BLOCK = """\
# one
name: example   # two
task: 'sequence-classification'
model: {source: "sample:minilm"}
data:
    source: sample:sentiment
    split:
        kind: "size"   # three

devices: [{count: 2, batch: 4, techniques: classifier+checkpointing}]
train:
    techniques:
    - name: deft
      settings:
        alpha: 0.1
        skip: {gamma: 1, below: 0.1}
    - lora: {exact: freeze-a}
    - live-norm
    steps: 2
federation: {rounds: 1, late: {buffer: 1}}
merge: [mean: {weight: equal}]
"""
"""Everything that is renamed, in each way that YAML has of writing it."""

UPGRADED = """\
# one
version: 2
name: example   # two
task: 'text-classification'
model: {source: "sample:minilm"}
data:
    source: sample:sentiment
    partition:
        kind: "power-law"   # three

devices: [{count: 2, batch_size: 4, techniques: head-only+gradient-checkpointing}]
train:
    techniques:
    - name: deft
      settings:
        density_weight: 0.1
        skip_mlps: {penalty: 1, skip_below: 0.1}
    - lora: {trained_factors: b-only}
    - batch-norm-statistics
    local_steps: 2
federation: {rounds: 1, asynchronous: {buffer_size: 1}}
merge: [mean: {weighting: equal}]
"""


def _without_memory(recipe: Recipe) -> Recipe:
    """The budgets of some recipes were raised to what was measured."""
    devices = [one.model_copy(update={"memory": None}) for one in recipe.devices]
    return recipe.model_copy(update={"devices": devices})


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
def test_an_old_recipe_and_its_successor_are_one(path: Path) -> None:
    assert len(OLD) == 12
    upgraded = upgrade_recipe_text(path.read_text(), path.name)
    assert read_recipe(path) == parse_recipe(upgraded, "upgraded")
    assert _without_memory(read_recipe(path)) == _without_memory(read_recipe(RECIPES / path.name))
    assert yaml.safe_load(upgraded) == translate_recipe(yaml.safe_load(path.read_text()))
    assert re.findall("#.*", upgraded) == re.findall("#.*", path.read_text())
    assert len(upgraded.splitlines()) == len(path.read_text().splitlines()) + 1


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_what_is_shipped_is_of_version_2_and_stays_as_it_is(path: Path) -> None:
    assert not needs_translation(yaml.safe_load(path.read_text()))
    assert upgrade_recipe_text(path.read_text(), path.name) == path.read_text()


def test_keys_and_values_are_replaced_where_they_stand() -> None:
    assert upgrade_recipe_text(BLOCK, "a.yaml") == UPGRADED


def test_line_ends_an_older_version_and_braces_stay() -> None:
    assert upgrade_recipe_text(BLOCK.replace("\n", "\r\n"), "a") == UPGRADED.replace("\n", "\r\n")
    assert upgrade_recipe_text(BLOCK.replace("name: ex", "version: 1\nname: ex"), "a") == UPGRADED
    flow = str(yaml.safe_load(BLOCK)).replace("None", "null")
    assert upgrade_recipe_text(flow, "a").startswith("{version: 2, 'name': 'example', 'task': 'text-classification'")


def test_anchors_and_merge_keys_follow_where_their_meaning_stays() -> None:
    text = BLOCK.replace("steps: 2", "<<: &work {steps: 2, batch: 3}")
    assert "<<: &work {local_steps: 2, batch_size: 3}" in upgrade_recipe_text(text, "a")


def test_an_anchor_that_would_mean_two_things_is_refused() -> None:
    shared = "&same {batch: 4, every: 1}"
    text = BLOCK + f"evaluation: {shared}\n"
    assert "evaluation: &same {batch_size: 4, every_n_rounds: 1}" in upgrade_recipe_text(text, "a")
    mixed = BLOCK.replace("{gamma: 1, below: 0.1}", "&same {gamma: 1, below: 0.1}") + "evaluation: {batch: 4}\n"
    mixed = mixed.replace("mean: {weight: equal}", "mean: *same")
    with pytest.raises(RecipeError, match=r"^a cannot be upgraded where it stands: an anchor or a merge key"):
        upgrade_recipe_text(mixed, "a")


def run(*argv: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli, ["recipe", "upgrade", *map(str, argv)])
    if isinstance(done.exception, RecipeError):
        return 2, done.stdout, str(done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.exit_code, done.stdout, done.stderr


def test_the_command_writes_over_the_file_or_beside_it_and_a_second_time_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(BLOCK.encode())
    path.chmod(0o640)
    assert run(path, "-o", tmp_path / "b.yaml") == (0, f"{tmp_path}/b.yaml is of version 2\n", "")
    assert ((tmp_path / "b.yaml").read_text(), path.read_text()) == (UPGRADED, BLOCK)
    assert run(path) == (0, f"{path} is of version 2\n", "")
    assert path.read_text() == UPGRADED
    assert run(path) == (0, f"{path} is of version 2 already\n", "")
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(found.name for found in tmp_path.iterdir()) == ["a.yaml", "b.yaml"]


def test_what_does_not_hold_is_refused_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(BLOCK.replace("count: 2", "cuont: 2"))
    code, _, said = run(path)
    assert (code, said.startswith(f"{path}, line 10: unknown key 'devices.0.cuont'")) == (2, True)
    assert "cuont" in path.read_text()
    assert run(tmp_path / "none.yaml")[0] == 2
