"""Figures beyond accuracy and loss that a recipe may ask for by name: F1, AUC and whatever else is registered.

A metric takes probabilities [n, classes] and class numbers [n], and gives a number, NaN where it means nothing.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import entry_points

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import RecipeError
from fedtune.explain import nearest
from fedtune.recipe import Recipe

__all__ = ["Metric", "auc", "balanced_accuracy", "check_metrics", "f1", "known", "measure", "register"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Metric = Callable[[Floats, Ints], float]

_GROUP = "fedtune.metrics"
"""Packages publish metrics of their own under this group of entry points, the name being what recipes call it."""


def f1(probabilities: Floats, labels: Ints) -> float:
    """The mean over classes, seen or predicted, of the harmonic mean of precision and recall (macro F1)."""
    predicted = probabilities.argmax(1)
    seen = np.union1d(labels, predicted)
    hits = np.array([np.sum((labels == one) & (predicted == one)) for one in seen])
    counted = np.array([np.sum(labels == one) + np.sum(predicted == one) for one in seen])
    return float(np.mean(2 * hits / counted))


def balanced_accuracy(probabilities: Floats, labels: Ints) -> float:
    """The mean over classes that occur of the share of their examples that is found."""
    right = probabilities.argmax(1) == labels
    return float(np.mean([right[labels == one].mean() for one in np.unique(labels)]))


def auc(probabilities: Floats, labels: Ints) -> float:
    """The area under the ROC curve: how often an example of a class ranks above one of another class.

    Of two classes that of the second; of more the mean over those that occur, each against the rest. NaN when all
    examples are of one class. By ranks: Hanley & McNeil 1982, Radiology 143.
    """
    classes = probabilities.shape[1]
    occurring = np.unique(labels)
    if len(occurring) < 2:
        return float("nan")
    chosen = [1] if classes == 2 else occurring
    return float(np.mean([_rank_sum(probabilities[:, one], labels == one) for one in chosen]))


def _rank_sum(scores: Floats, positive: NDArray[np.bool_]) -> float:
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # ties share their mean rank
    many = int(positive.sum())
    return float((ranks[positive].sum() - many * (many + 1) / 2) / (many * (len(scores) - many)))


_METRICS: dict[str, Metric] = {"auc": auc, "balanced-accuracy": balanced_accuracy, "f1": f1}


def register(name: str, metric: Metric) -> None:
    """Make a metric known in this process; a package that is installed publishes it as an entry point instead."""
    _METRICS[name] = metric


def known() -> list[str]:
    """The names of all metrics, in order."""
    return sorted({*_METRICS, *_published()})


def measure(names: Sequence[str], probabilities: Floats, labels: Ints) -> dict[str, float]:
    """Each named metric over some examples; NaN over none."""
    if not len(labels):
        return dict.fromkeys(names, float("nan"))
    return {name: float(_find(name)(probabilities, labels)) for name in names}


def check_metrics(recipe: Recipe) -> None:
    """RecipeError for metrics that are unknown, or need classes where there are none."""
    names = recipe.evaluation.metrics
    for name in names:
        _find(name)
    if names and recipe.task == "causal-language-modelling":
        raise RecipeError(f"evaluation.metrics: {names[0]} is of classes, which {recipe.task} has none of; drop it")


def _find(name: str) -> Metric:
    if name in _METRICS:
        return _METRICS[name]
    if name not in _published():
        raise RecipeError(f"evaluation.metrics: there is no {name!r}; {nearest(name, known())}")
    found: Metric = _published()[name]()
    return found


@cache
def _published() -> dict[str, Callable[[], Metric]]:
    return {point.name: point.load for point in entry_points(group=_GROUP)}
