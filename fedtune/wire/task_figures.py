"""What a client tells of each task of a stream: predictions, accuracy and loss, in the order of the recipe's tasks."""

from collections.abc import Sequence
from typing import NamedTuple, Self

__all__ = ["NOT_REPORTED", "TaskFigures"]

NOT_REPORTED = (0, 0.0, 0.0)
"""Stands for a task that the client has not begun, or of which it holds out too few examples."""


class TaskFigures(NamedTuple):
    """One entry per distinct task in each list. An entry without predictions says nothing."""

    predictions: Sequence[int]
    accuracies: Sequence[float]
    losses: Sequence[float]

    @classmethod
    def from_tasks(cls, told: Sequence[tuple[int, float, float]]) -> Self:
        """Make the lists from one tuple per task."""
        return cls(*(list(column) for column in zip(*told, strict=True)))

    def list_reported(self) -> list[tuple[int, int, float, float]]:
        """Return the number, predictions, accuracy and loss of each task that was scored."""
        every = zip(self.predictions, self.accuracies, self.losses, strict=True)
        return [(task, *figures) for task, figures in enumerate(every) if figures[0]]
