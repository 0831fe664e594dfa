"""Metrics by their definitions, one example or pair of examples at a time: the oracles beside scikit-learn's."""

from collections.abc import Sequence
from statistics import fmean

__all__ = ["count_auc", "count_balanced_accuracy", "count_f1"]

Rows = Sequence[Sequence[float]]


def count_f1(predicted: Sequence[int], labels: Sequence[int]) -> float:
    """2 TP / (2 TP + FP + FN), averaged over the classes that occur or are predicted."""
    pairs = list(zip(predicted, labels, strict=True))
    classes = {*predicted, *labels}
    hits = {one: pairs.count((one, one)) for one in classes}
    wrong = {one: sum((a == one) != (b == one) for a, b in pairs) for one in classes}
    return fmean(2 * hits[one] / (2 * hits[one] + wrong[one]) for one in classes)


def count_balanced_accuracy(predicted: Sequence[int], labels: Sequence[int]) -> float:
    """The share of each occurring class's examples that is found, averaged."""
    pairs = list(zip(predicted, labels, strict=True))
    return fmean(pairs.count((one, one)) / list(labels).count(one) for one in set(labels))


def count_auc(probabilities: Rows, labels: Sequence[int]) -> float:
    """How often an example of a class ranks above one of another class, ties counting half; averaged over classes."""
    chosen = [1] if len(probabilities[0]) == 2 else sorted(set(labels))
    return fmean(_rank_pairs([row[one] for row in probabilities], [label == one for label in labels]) for one in chosen)


def _rank_pairs(scores: Sequence[float], positive: Sequence[bool]) -> float:
    above = [score for score, yes in zip(scores, positive, strict=True) if yes]
    below = [score for score, yes in zip(scores, positive, strict=True) if not yes]
    return fmean((a > b) + 0.5 * (a == b) for a in above for b in below)
