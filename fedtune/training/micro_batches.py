"""Splits a batch into micro-batches, which saves memory without changing the examples or the mean loss of a step.

The loss of a batch is the mean over its predictions, one per example or one per labelled token. The loss of a
micro-batch is therefore weighted by its share of the predictions. Its gradients add up to those of the batch, except
for rounding.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from fedtune.tasks import Task
from fedtune.techniques import UnfrozenBatchNorm2d

__all__ = ["can_split_batch", "compute_loss_weights", "split_into_micro_batches"]


def can_split_batch(task: Task, model: nn.Module) -> bool:
    """Return whether a batch may be split: not if norms or the loss depend on the whole batch."""
    return task.can_split_batch and not any(isinstance(layer, UnfrozenBatchNorm2d) for layer in model.modules())


def split_into_micro_batches(batch: Sequence[int], size: int) -> list[list[int]]:
    """Split examples into lists of at most ``size``."""
    return [list(batch[start : start + size]) for start in range(0, len(batch), size)]


def compute_loss_weights(task: Task, parts: Sequence[Mapping[str, Tensor]]) -> list[float]:
    """Return the share of all predictions in each micro-batch."""
    counts = [task.count_predictions(part["labels"]) for part in parts]
    return [count / max(1, sum(counts)) for count in counts]
