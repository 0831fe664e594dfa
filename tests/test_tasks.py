"""Every task keeps the promises of the base class; recipes know the tasks by listing their files."""

import math
import re
import subprocess
import sys

import pytest
import torch
import transformers
from torch.nn import functional as F

from fedtune import tasks
from fedtune.errors import RecipeError
from fedtune.recipe.task_settings import list_task_names
from fedtune.recipe.unit_registry import list_unit_names, read_unit_card
from fedtune.tasks import ScoreSums, Task, get_task
from fedtune.training.resolve import resolve_recipe
from tests.data_examples import a_recipe
from tests.families import FAMILIES

NAMES = list_task_names()


@pytest.fixture(params=NAMES)
def task(request: pytest.FixtureRequest) -> Task:
    return get_task(request.param)


def test_recipes_and_the_registry_list_the_same_tasks() -> None:
    assert list(NAMES) == list_unit_names("fedtune.tasks")
    assert {"text-classification", "text-generation", "image-classification"} <= set(NAMES)


def test_a_task_has_a_card_and_the_facts_that_others_ask(task: Task) -> None:
    card = read_unit_card("fedtune.tasks", task.name)
    for heading in ("What:", "Columns:", "Loss:", "Metrics:", "Models:"):
        assert f"\n{heading} " in card
    assert all(f"``{column}``" in card for column in task.columns)
    assert task.has_classes == ("label" in task.columns)
    assert hasattr(transformers, task.auto_class)
    assert task.main_metric in card
    assert task.main_metric in task.compute_metrics(ScoreSums(2, 1, 2.0))


def test_an_unknown_task_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="task: there is no 'text-clasification'; did you mean 'text-classification'"):
        a_recipe("task=text-clasification")
    with pytest.raises(RecipeError, match="task: there is no 'text-clasification'; did you mean 'text-classification'"):
        get_task("text-clasification")


def test_names_are_listed_without_importing_a_task_or_torch() -> None:
    script = (
        "import sys\nfrom fedtune.recipe.task_settings import list_task_names\nassert list_task_names()\n"
        "assert not [name for name in sys.modules if name.startswith(('torch', 'fedtune.tasks'))]\n"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("feature-extraction", "preference")])
def test_each_example_is_scored_as_a_slow_twin_scores_it(name: str) -> None:
    task = get_task(name)
    random = torch.Generator().manual_seed(4)
    if task.has_classes:
        logits, labels = torch.randn(5, 3, generator=random), torch.tensor([0, 2, 1, 1, 0])
        pairs = [[(logits[row], int(labels[row]))] for row in range(5)]
    else:
        logits = torch.randn(5, 6, 7, generator=random)
        labels = torch.randint(0, 7, (5, 6), generator=random)
        labels[1, 4:] = -100
        labels[3, 1:] = -100
        ahead = 1 if task.name == "text-generation" else 0
        pairs = [
            [
                (logits[row, at], int(labels[row, at + ahead]))
                for at in range(6 - ahead)
                if labels[row, at + ahead] != -100
            ]
            for row in range(5)
        ]
    scores = task.score_logits(logits, labels)
    assert len(scores) == 5
    for score, wanted in zip(scores, pairs, strict=True):
        assert score.predictions == len(wanted)
        assert score.correct == sum(int(one.argmax()) == label for one, label in wanted)
        loss = sum(float(F.cross_entropy(one[None].double(), torch.tensor([label]))) for one, label in wanted)
        assert score.loss == pytest.approx(loss, rel=1e-6, abs=1e-12)
        if task.has_classes:
            probabilities, label = score.output
            torch.testing.assert_close(probabilities, wanted[0][0].softmax(0))
            assert label == wanted[0][1]
        else:
            assert score.output is None


def test_perplexity_is_that_of_the_mean_loss_and_stays_finite() -> None:
    language = get_task("text-generation")
    assert language.compute_metrics(ScoreSums(4, 2, 8.0))["perplexity"] == pytest.approx(math.exp(2.0))
    assert math.isfinite(language.compute_metrics(ScoreSums(1, 0, 1e6))["perplexity"])
    assert get_task("text-classification").compute_metrics(ScoreSums(4, 1, 8.0)) == {"accuracy": 0.25, "loss": 2.0}


@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_a_random_batch_has_the_size_that_is_described_and_gives_a_loss(family: str) -> None:
    model, task = FAMILIES[family].model(), FAMILIES[family].task
    recipe = a_recipe(f"task={task.name}", "train.batch_size=3", "train.max_length=12", "train.image_size=16")
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"source": "sample:logistic"})})
    batch = task.make_random_batch(model, recipe, 3, torch.Generator().manual_seed(0))
    inputs = next(iter(batch.values()))
    size = re.match(r"\d+", task.describe_input_size(recipe.train))
    assert size is not None
    assert inputs.shape[0] == 3
    assert inputs.shape[-1] == int(size[0])
    assert torch.isfinite(model(**batch).loss)


def test_the_room_s_functions_ask_the_recipe_s_task() -> None:
    recipe = a_recipe("task=text-generation")
    assert tasks.load_class_names(recipe) == ()
    assert tasks.resolve_reader(recipe) is recipe


def test_a_recipe_may_name_the_metric_that_counts() -> None:
    """By default it is the task's; one that the task does not have is refused with the nearest."""
    assert resolve_recipe(a_recipe()).evaluation.main_metric == "accuracy"
    assert resolve_recipe(a_recipe("task=text-generation")).evaluation.main_metric == "perplexity"
    named = resolve_recipe(a_recipe("evaluation={metrics: [f1], main_metric: f1}"))
    assert named.evaluation.main_metric == "f1"
    with pytest.raises(RecipeError, match=r"main_metric: text-classification has no 'acuracy'; did you mean"):
        resolve_recipe(a_recipe("evaluation.main_metric=acuracy"))
