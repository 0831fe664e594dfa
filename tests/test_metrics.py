"""Metrics beyond accuracy beside scikit-learn's, and their way through recipes and scoring."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn import metrics as sklearn

from fedtune.errors import RecipeError
from fedtune.simulation import resolve
from fedtune.training import load_state, score, workshop
from fedtune.training import metrics as ours
from fedtune.training.metrics import measure, register
from tests.data_examples import a_recipe
from tests.federations import execute, words

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def some(classes: int, seed: int, *, ties: bool = False) -> tuple[Floats, Ints]:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, 60)])
    scores = rng.random((len(labels), classes)) + 0.5 * np.eye(classes)[labels]
    if ties:
        scores = scores.round(1)
    return scores / scores.sum(1, keepdims=True), labels


def their_auc(probabilities: Floats, labels: Ints) -> float:
    chosen = probabilities[:, 1] if probabilities.shape[1] == 2 else probabilities
    return float(sklearn.roc_auc_score(labels, chosen, multi_class="ovr"))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize(
    ("metric", "oracle"),
    [
        (ours.f1, lambda p, y: sklearn.f1_score(y, p.argmax(1), average="macro")),
        (ours.balanced_accuracy, lambda p, y: sklearn.balanced_accuracy_score(y, p.argmax(1))),
        (ours.auc, their_auc),
    ],
)
def test_figures_are_those_of_scikit_learn(
    metric: ours.Metric, oracle: Callable[[Floats, Ints], float], classes: int, ties: bool
) -> None:
    for seed in range(3):
        probabilities, labels = some(classes, seed, ties=ties)
        assert metric(probabilities, labels) == pytest.approx(oracle(probabilities, labels), abs=1e-12)


def test_a_class_that_does_not_occur_is_left_out_of_the_mean() -> None:
    probabilities, labels = some(4, 0)
    there = labels < 3
    probabilities, labels = probabilities[there], labels[there]
    each = [sklearn.roc_auc_score(labels == one, probabilities[:, one]) for one in range(3)]
    assert ours.auc(probabilities, labels) == pytest.approx(np.mean(each), abs=1e-12)
    assert ours.f1(probabilities, labels) == pytest.approx(
        sklearn.f1_score(labels, probabilities.argmax(1), average="macro"), abs=1e-12
    )


def test_no_curve_can_be_drawn_of_one_class() -> None:
    assert math.isnan(ours.auc(np.full((3, 2), 0.5), np.zeros(3, np.int64)))
    assert all(map(math.isnan, measure(["f1", "auc"], np.zeros((0, 2)), np.zeros(0, np.int64)).values()))


def test_a_run_scores_what_its_recipe_asks_for(home: Path, tmp_path: Path) -> None:
    register("always-half", lambda probabilities, labels: 0.5)
    recipe = words(tmp_path, "evaluation={metrics: [f1, auc, always-half]}")
    ended = execute(recipe)
    shop = workshop(recipe.model_dump_json())
    last = {(one.part, one.name): one.value for one in ended.rounds[-1].metrics if one.domain == "all"}
    assert last["test", "always-half"] == 0.5
    state = ended.rounds[-1].checkpoint
    assert state is not None
    from fedtune import checkpoint
    from fedtune import home as homes

    load_state(shop.model, checkpoint.load(homes.runs() / state.path))
    batch = shop.test.batch(range(len(shop.test)))
    labels = batch.pop("labels").numpy()
    probabilities = shop.model.eval()(**batch).logits.softmax(-1).detach().double().numpy()
    assert last["test", "f1"] == pytest.approx(sklearn.f1_score(labels, probabilities.argmax(1), average="macro"))
    assert last["test", "auc"] == pytest.approx(sklearn.roc_auc_score(labels, probabilities[:, 1]), abs=1e-6)
    assert last["test-before", "f1"] != last["test", "f1"]


def test_figures_are_also_told_per_domain(tmp_path: Path) -> None:
    recipe = words(tmp_path, "data.columns.domain=label")
    shop = workshop(recipe.model_dump_json())
    found = score(shop.model, shop.test, 4, recipe.task, shop.techniques, metrics=["f1"])
    assert {one.domain for one in found if one.name == "f1"} == {"all", "good", "bad"}


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["evaluation.metrics=[auk]"], "evaluation.metrics: there is no 'auk'; did you mean 'auc'"),
        (
            ["evaluation.metrics=[auc]", "task=causal-language-modelling"],
            "evaluation.metrics: auc is of classes, which causal-language-modelling has none of",
        ),
    ],
)
def test_a_metric_that_cannot_be_had_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        resolve(a_recipe(*overrides))
