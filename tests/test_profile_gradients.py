"""``--check``: exact techniques differ from their twin by nothing, broken ones are caught."""

import sys
from pathlib import Path

import pytest

from fedtune import techniques
from fedtune.errors import ModelError
from fedtune.profiling import profile_step
from fedtune.recipe.schema import Recipe
from tests.profile_examples import a_case, a_recipe, tiny_bert

FORGETFUL = """
from typing import Any, ClassVar

from fedtune.techniques._technique import Technique


class Forgetful(Technique):
    name: ClassVar[str] = "forgetful"
    selects_trainable_tensors: ClassVar[bool] = False

    def rewrite_model(self, model: Any, task: Any, seed: int) -> None:
        model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})

    def make_reference(self) -> None:
        return None
"""
"""Blocks run again with other random numbers than before: with dropout, the gradients are those of another network."""

STRANGER = f"""{FORGETFUL.replace("Forgetful", "Stranger").replace("forgetful", "stranger")}
    def begin_round(self, model: Any, number: int) -> None:
        model.classifier.bias.requires_grad_(False)
"""
ENDLESS = f"""{FORGETFUL.replace("Forgetful", "Endless").replace("forgetful", "endless")}
    def begin_step(self, model: Any, batch: Any, progress: float) -> None:
        model.classifier.weight.data.fill_(float("inf"))
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return a_recipe(tiny_bert(tmp_path_factory.mktemp("bert")))


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Techniques that live for one test."""
    for name, text in {"forgetful": FORGETFUL, "stranger": STRANGER, "endless": ENDLESS}.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        monkeypatch.delitem(sys.modules, f"fedtune.techniques.{name}", raising=False)
    monkeypatch.setattr(techniques, "__path__", [*techniques.__path__, str(tmp_path)])


@pytest.mark.parametrize("joined", ["full", "full+gradient-checkpointing", "lora+gradient-checkpointing", "bias"])
def test_exact_gradients_differ_by_nothing_with_dropout_on(recipe: Recipe, joined: str) -> None:
    assert profile_step(a_case(recipe, joined, check=True)).gradient_error == 0.0


def test_exact_gradients_differ_by_nothing_in_half_precision(recipe: Recipe) -> None:
    half = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "bfloat16"})})
    assert profile_step(a_case(half, "full+gradient-checkpointing", check=True)).gradient_error == 0.0


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize("trainer", ["full", "lora"])
def test_a_broken_recomputation_is_caught(recipe: Recipe, trainer: str) -> None:
    error = profile_step(a_case(recipe, f"{trainer}+forgetful", check=True)).gradient_error
    assert error is not None
    assert error > 0.01


@pytest.mark.usefixtures("planted")
def test_a_technique_that_trains_other_tensors_than_its_twin_is_caught(recipe: Recipe) -> None:
    with pytest.raises(ModelError, match=r"classifier\.bias is trained either by the technique or by the reference"):
        profile_step(a_case(recipe, "full+stranger", check=True))


@pytest.mark.usefixtures("planted")
def test_gradients_that_are_not_finite_are_no_agreement(recipe: Recipe) -> None:
    with pytest.raises(ModelError, match=r"is not finite; lower train\.lr"):
        profile_step(a_case(recipe, "full+endless", check=True))
