"""Metrics that a recipe requests by name besides accuracy and loss: F1, AUC and registered ones.

A metric is computed from probabilities [n, classes] and class numbers [n]. It returns a number, or NaN if it is not
defined.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import RecipeError
from fedtune.recipe.plug_ins import find_plug_in, find_plug_ins
from fedtune.recipe.schema import Recipe
from fedtune.recipe.validation_errors import suggest_nearest
from fedtune.tasks import Task, get_task
from fedtune.training.answer_metrics import ANSWER_METRICS

__all__ = ["Metric", "check_metrics", "list_client_metrics", "list_metric_names", "load_metrics", "measure", "register"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Metric = Callable[[Floats, Ints], float]

_GROUP = "fedtune.metrics"
"""The entry point group in which packages publish metrics. The entry point's name is the metric's name in recipes."""

_WHERE = "evaluation.metrics"
_BUILT_IN = ("auc", "balanced-accuracy", "f1")
_registered: dict[str, Metric] = {}


def register(name: str, metric: Metric) -> None:
    """Register a metric in this process. An installed package publishes it as an entry point instead."""
    _registered[name] = metric


def list_metric_names() -> list[str]:
    """Return the names of all metrics, sorted."""
    return sorted({*_BUILT_IN, *_registered, *find_plug_ins(_GROUP)})


def measure(names: Sequence[str], probabilities: Floats, labels: Ints) -> dict[str, float]:
    """Return each named metric over the examples; NaN without examples or if a probability is not finite."""
    if not len(labels) or not np.isfinite(probabilities).all():
        return dict.fromkeys(names, float("nan"))
    return {name: float(_find(name)(probabilities, labels)) for name in names}


def load_metrics(recipe: Recipe) -> None:
    """Import the metrics that clients compute too; RecipeError for one that is unknown or not installed."""
    for name in list_client_metrics(recipe):
        _find(name)


def check_metrics(recipe: Recipe) -> None:
    """Raise RecipeError for metrics that are unknown, or that the task cannot have."""
    task = get_task(recipe.task)
    if not task.has_classes:
        for name in recipe.evaluation.metrics:
            _check_answer_metric(name, task)
        return
    if "exact_match" in recipe.evaluation.metrics:
        raise RecipeError(f"{_WHERE}: exact_match compares generated answers, but {task.name} has classes; drop it")
    load_metrics(recipe)


def _check_answer_metric(name: str, task: Task) -> None:
    """Raise RecipeError for a task without classes that does not have the metric."""
    if name not in ANSWER_METRICS:
        _require_known(name)
        raise RecipeError(f"{_WHERE}: {name} is of classes, which {task.name} has none of; drop it")
    if not task.compares_answers:
        raise RecipeError(
            f"{_WHERE}: {name} is of classes or answers, which {task.name} has none of as it is set; drop it"
        )


def list_client_metrics(recipe: Recipe) -> list[str]:
    """Return the further metrics that clients compute on held-out examples. They generate no answers."""
    return list(recipe.evaluation.metrics) if get_task(recipe.task).has_classes else []


def _find(name: str) -> Metric:
    if name in _registered:
        return _registered[name]
    built_in = "fedtune.training.class_metrics" if name in _BUILT_IN else None
    plug_in = find_plug_in(_GROUP, name, _WHERE, built_in)
    if plug_in is not None:
        found: Metric = plug_in.load(_WHERE, code="metric-unavailable")
        return found
    if built_in is None:
        _require_known(name)
    return _built_in(name)


def _require_known(name: str) -> None:
    known = sorted({*list_metric_names(), *ANSWER_METRICS})
    if name not in known:
        raise RecipeError(f"{_WHERE}: there is no {name!r}; {suggest_nearest(name, known)}", code="metric-unavailable")


def _built_in(name: str) -> Metric:
    """Return a metric computed by scikit-learn, which is imported only if a recipe uses it."""
    try:
        from fedtune.training import class_metrics
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"evaluation.metrics: {name} needs {error.name}, which is not installed; pip install scikit-learn",
            code="metric-unavailable",
        ) from error
    return class_metrics.METRICS[name]
