"""The accuracy matrix of a stream: R[i, j] is the accuracy on task j after visit i. Row 0 is before training."""

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Score", "TaskMatrix"]

Score = float | None
"""An accuracy, or None where a task was not scored."""


@dataclass(frozen=True, kw_only=True)
class TaskMatrix:
    """Accuracies of one scope: the whole run, a device class, or a client.

    Columns are the distinct ``tasks``. Rows are positions in the stream: row i belongs to visit i, which trained the
    task of column ``visits[i - 1]``. A task that recurs has several rows and one column. ``examples`` are the tasks'
    numbers of test examples, None if they are not known. Clients with orders of their own have no common end of a task:
    without ``has_order``, only the last row means something.
    """

    tasks: tuple[str, ...]
    visits: tuple[int, ...]
    rows: tuple[tuple[Score, ...], ...]
    examples: tuple[int | None, ...] = ()
    has_order: bool = True

    @property
    def last(self) -> int:
        """The number of the last row that has a score; 0 before the first visit has ended."""
        return max((number for number, row in enumerate(self.rows) if any(one is not None for one in row)), default=0)

    def get(self, row: int, task: int) -> Score:
        """Return one score; None for a row that does not exist."""
        return self.rows[row][task] if 0 <= row < len(self.rows) else None

    def list_seen(self, row: int) -> list[int]:
        """Return the tasks that were trained in the visits up to a row, in the order of their first visit."""
        return list(dict.fromkeys(self.visits[:row]))

    def find_first_end(self, task: int) -> int | None:
        """Return the row at the end of a task's first visit; None before that."""
        ended = self.visits[: len(self.rows) - 1]
        return ended.index(task) + 1 if task in ended else None

    def find_first_score(self, task: int) -> int | None:
        """Return the first row, from the task's first end on, in which the task was scored; None if there is none.

        A client that was away at the end of a task has its first score of the task later.
        """
        first = self.find_first_end(task)
        if first is None:
            return None
        return next((row for row in range(first, len(self.rows)) if self.rows[row][task] is not None), None)

    def iter_learned(self) -> Iterator[tuple[int, int, float]]:
        """Yield each task that was scored after its first end: its column, that row, and the score."""
        for task in range(len(self.tasks)):
            row = self.find_first_score(task)
            score = None if row is None else self.rows[row][task]
            if row is not None and score is not None:
                yield task, row, score
