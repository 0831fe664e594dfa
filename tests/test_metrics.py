"""Metrics beyond accuracy beside their definitions, and their way through recipes and scoring."""

import math
import os
import subprocess
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fedtune import checkpoint
from fedtune import paths as homes
from fedtune.device.trainer import Trainer
from fedtune.device.trainer_channel import Frame
from fedtune.errors import RecipeError
from fedtune.simulation import resolve_recipe
from fedtune.tasks import get_task
from fedtune.training import EvaluatedModel, class_metrics, evaluate_model, get_run_context, set_model_state
from fedtune.training.metrics import measure, register
from fedtune.wire.client_update import TrainRequest
from fedtune.wire.protocol_codes import parse_problem
from tests.data_examples import a_recipe
from tests.federations import execute, trivial, words
from tests.metric_oracles import count_auc, count_balanced_accuracy, count_f1

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
ALL = ["auc", "balanced-accuracy", "f1"]


def some(classes: int, seed: int, *, ties: bool = False) -> tuple[Floats, Ints]:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, 60)])
    scores = rng.random((len(labels), classes)) + 0.5 * np.eye(classes)[labels]
    if ties:
        scores = scores.round(1)
    return scores / scores.sum(1, keepdims=True), labels


def assert_as_counted(probabilities: Floats, labels: Ints) -> None:
    predicted, seen = probabilities.argmax(1).tolist(), labels.tolist()
    assert measure(ALL, probabilities, labels) == {
        "auc": pytest.approx(count_auc(probabilities.tolist(), seen), abs=1e-12),
        "balanced-accuracy": pytest.approx(count_balanced_accuracy(predicted, seen), abs=1e-12),
        "f1": pytest.approx(count_f1(predicted, seen), abs=1e-12),
    }


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_figures_are_those_of_their_definitions(classes: int, ties: bool) -> None:
    for seed in range(3):
        assert_as_counted(*some(classes, seed, ties=ties))


@pytest.mark.parametrize(("classes", "many"), [(4, 40), (10, 5), (200, 150)])
def test_classes_that_do_not_occur_are_left_out_of_the_means(classes: int, many: int) -> None:
    probabilities, labels = some(classes, 0)
    there = labels < classes - 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_as_counted(probabilities[there][:many], labels[there][:many])


def test_figures_worked_out_by_hand() -> None:
    predicted, labels = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0])
    found = measure(ALL, np.eye(4)[predicted], labels)
    assert found["f1"] == pytest.approx((1 / 2 + 4 / 5 + 0) / 3)
    assert found["balanced-accuracy"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert found["auc"] == pytest.approx((7 / 12 + 5 / 6) / 2)


def test_of_one_class_there_is_no_curve_and_no_other_figure_is_lost() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = measure(ALL, np.eye(2)[[0, 0, 1]], np.zeros(3, np.int64))
    assert math.isnan(found["auc"])
    assert [found["f1"], found["balanced-accuracy"]] == [pytest.approx(0.4), pytest.approx(2 / 3)]


@pytest.mark.parametrize(
    ("probabilities", "labels"), [(np.zeros((0, 2)), []), (np.array([[0.1, 0.9], [np.nan, np.nan]]), [1, 0])]
)
def test_over_no_examples_and_of_a_diverged_model_no_figure_is_told(probabilities: Floats, labels: list[int]) -> None:
    assert all(map(math.isnan, measure(ALL, probabilities, np.array(labels, np.int64)).values()))


@pytest.fixture
def without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    monkeypatch.delitem(sys.modules, class_metrics.__name__)
    monkeypatch.delattr("fedtune.training.class_metrics")


@pytest.mark.usefixtures("without_scikit_learn")
def test_without_scikit_learn_a_recipe_that_asks_for_a_figure_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"f1 needs sklearn\.metrics, which is not installed; pip install scikit-learn"
    ):
        trivial("evaluation={own: 0.2, metrics: [f1]}")


def test_a_minimal_install_without_it_says_so_before_it_trains(home: Path, request: pytest.FixtureRequest) -> None:
    order = TrainRequest(trivial("evaluation={own: 0.2, metrics: [f1]}").model_dump_json(), 1, 0, "run")
    request.getfixturevalue("without_scikit_learn")
    said = Trainer("partition:0", 10**11, 0).run_request(Frame(asdict(order)), lambda: pytest.fail("it trains"))
    problem = parse_problem(said.header["problem"])
    assert problem is not None
    assert "install scikit-learn, or the package that publishes the metric, on the device" in problem.remote_sentence


def test_scikit_learn_is_imported_only_where_a_metric_is_asked_for() -> None:
    script = (
        "import sys; import numpy as np; from fedtune.training.metrics import list_metric_names, measure\n"
        "list_metric_names()\n"
        "measure([], np.eye(2), np.arange(2)); assert 'sklearn' not in sys.modules\n"
        "measure(['f1'], np.eye(2), np.arange(2)); assert 'sklearn' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_scores_what_its_recipe_asks_for(home: Path, tmp_path: Path) -> None:
    register("always-half", lambda probabilities, labels: 0.5)
    recipe = words(tmp_path, "evaluation={metrics: [f1, auc, always-half]}")
    ended = execute(recipe)
    shop = get_run_context(recipe.model_dump_json())
    last = {(one.split, one.name): one.value for one in ended.rounds[-1].metrics if one.domain == "all"}
    assert last["test", "always-half"] == 0.5
    state = ended.rounds[-1].checkpoint
    assert state is not None
    set_model_state(shop.model, checkpoint.read_checkpoint(homes.get_runs_folder() / state.path))
    batch = shop.test.make_batch(range(len(shop.test)))
    labels = batch.pop("labels").numpy()
    probabilities = shop.model.eval()(**batch).logits.softmax(-1).detach().double().numpy()
    assert last["test", "f1"] == pytest.approx(count_f1(probabilities.argmax(1).tolist(), labels.tolist()))
    assert last["test", "auc"] == pytest.approx(count_auc(probabilities.tolist(), labels.tolist()), abs=1e-6)
    assert last["test-before", "f1"] != last["test", "f1"]


def test_a_package_publishes_a_metric_as_an_entry_point(tmp_path: Path) -> None:
    (tmp_path / "cautious.py").write_text(
        "def sureness(probabilities, labels):\n    return probabilities.max(1).mean()\n"
    )
    (tmp_path / "cautious-1.0.dist-info").mkdir()
    (tmp_path / "cautious-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: cautious\nVersion: 1.0\n"
    )
    (tmp_path / "cautious-1.0.dist-info" / "entry_points.txt").write_text(
        "[fedtune.metrics]\nsureness = cautious:sureness\n"
    )
    script = (
        "import numpy as np; from fedtune.training.metrics import list_metric_names, measure\n"
        "assert 'sureness' in list_metric_names()\n"
        "print(measure(['sureness'], np.array([[0.25, 0.75], [0.5, 0.5]]), np.array([0, 1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{Path.cwd()}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == ("{'sureness': 0.625}", "")


def test_figures_are_also_told_per_domain(tmp_path: Path) -> None:
    recipe = words(tmp_path, "data.columns.domain=label")
    shop = get_run_context(recipe.model_dump_json())
    found = evaluate_model(
        EvaluatedModel(shop.model, get_task(recipe.task), 4, shop.techniques, metrics=["f1"]), shop.test
    )
    assert {one.domain for one in found if one.name == "f1"} == {"all", "good", "bad"}


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["evaluation.metrics=[auk]"], "evaluation.metrics: there is no 'auk'; did you mean 'auc'"),
        (
            ["evaluation.metrics=[auc]", "task=text-generation"],
            "evaluation.metrics: auc is of classes, which text-generation has none of",
        ),
    ],
)
def test_a_metric_that_cannot_be_had_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        resolve_recipe(a_recipe(*overrides))
