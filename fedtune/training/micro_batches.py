"""A step in micro-batches: the same examples and the same mean loss, a part of them at a time, for less memory.

The loss of a batch is the mean over its predictions, one per example or one per token with a label. So the parts'
losses weigh by their shares of the predictions, and the gradients they leave add up to the whole batch's, to rounding.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from fedtune.tasks import Task
from fedtune.techniques import UnfrozenBatchNorm2d

__all__ = ["can_split_batch", "compute_loss_weights", "split_into_micro_batches"]


def can_split_batch(task: Task, model: nn.Module) -> bool:
    """Whether a batch may be cut: not where norms or the loss follow the batch as a whole."""
    return task.can_split_batch and not any(isinstance(layer, UnfrozenBatchNorm2d) for layer in model.modules())


def split_into_micro_batches(batch: Sequence[int], size: int) -> list[list[int]]:
    """Examples in parts of at most ``size``."""
    return [list(batch[start : start + size]) for start in range(0, len(batch), size)]


def compute_loss_weights(task: Task, parts: Sequence[Mapping[str, Tensor]]) -> list[float]:
    """Each part's share of all predictions."""
    counts = [task.count_predictions(part["labels"]) for part in parts]
    return [count / max(1, sum(counts)) for count in counts]
