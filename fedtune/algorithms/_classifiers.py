"""The last layer of a classifier, and the classes of a client's examples."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtune.data import EncodedDataset
from fedtune.errors import ModelError, RecipeError
from fedtune.recipe.schema import Recipe
from fedtune.tasks import get_task
from fedtune.techniques import list_head_parameters

__all__ = ["count_classes", "find_last_layer", "require_classes"]

_ROWS = 256
"""Examples that are encoded at a time to read their labels."""


def require_classes(name: str, recipe: Recipe) -> None:
    """Raise RecipeError unless each example of the task has one class."""
    task = get_task(recipe.task)
    if not task.has_classes:
        raise RecipeError(
            f"federation.algorithm: {name} is for tasks whose examples have a class, and {task.name} has none; take "
            "fedprox, scaffold or feddyn"
        )


def find_last_layer(name: str, model: nn.Module) -> nn.Linear:
    """Return the last linear layer of a classifier; ModelError if it ends otherwise."""
    inside = set(list_head_parameters(model))
    layers = [one for key, one in model.named_modules() if isinstance(one, nn.Linear) and f"{key}.weight" in inside]
    if not layers:
        raise ModelError(
            f"federation.algorithm: {name} acts at the last linear layer of a classifier, and {type(model).__name__} "
            "does not end in one; take fedprox, scaffold or feddyn"
        )
    return layers[-1]


def count_classes(examples: EncodedDataset, rows: NDArray[np.int64], num_classes: int) -> Tensor:
    """Return the number of examples [classes] of each class among the rows."""
    counts = torch.zeros(num_classes, dtype=torch.int64)
    for start in range(0, len(rows), _ROWS):
        labels = examples.make_batch(rows[start : start + _ROWS].tolist())["labels"]
        counts += torch.bincount(labels, minlength=num_classes)
    return counts
