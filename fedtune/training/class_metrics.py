"""The built-in metrics of classifiers, computed by scikit-learn. Undefined cases are handled here."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import f1_score, recall_score, roc_auc_score

__all__ = ["METRICS", "balanced_accuracy", "compute_auc", "f1"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def f1(probabilities: Floats, labels: Ints) -> float:
    """Return macro F1: the mean over the classes that occur or are predicted.

    Without a true positive, a class counts 0.
    """
    return float(f1_score(labels, probabilities.argmax(1), average="macro", zero_division=0))


def balanced_accuracy(probabilities: Floats, labels: Ints) -> float:
    """Return the mean recall over the classes that occur. Classes that are only predicted do not count."""
    occurring = np.unique(labels)
    return float(recall_score(labels, probabilities.argmax(1), labels=occurring, average="macro", zero_division=0))


def compute_auc(probabilities: Floats, labels: Ints) -> float:
    """Return the area under the ROC curve: of the second of two classes, or the mean of each class against the rest.

    Classes that do not occur are left out of the mean. NaN when all examples belong to one class.
    """
    occurring = np.unique(labels)
    if len(occurring) < 2:
        return float("nan")
    chosen = [1] if probabilities.shape[1] == 2 else occurring
    return float(np.mean([roc_auc_score(labels == one, probabilities[:, one]) for one in chosen]))


METRICS: Mapping[str, Callable[[Floats, Ints], float]] = {
    "auc": compute_auc,
    "balanced-accuracy": balanced_accuracy,
    "f1": f1,
}
