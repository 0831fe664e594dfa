"""What the store keeps of a stream of tasks: its visits, and the scores of each task by client and device class."""

from dataclasses import dataclass

__all__ = ["TaskRecord", "TaskScore"]


@dataclass(frozen=True, kw_only=True)
class TaskRecord:
    """A visit of a stream: the training of one task from ``first_round`` to ``last_round``, None until it has ended.

    Visits are numbered from 1. A task that recurs has several. ``opened_by`` is recipe or drift. ``labels`` are those
    that the visit brings, empty if it brings all. ``test_examples`` counts the task's test examples, None if unknown.
    """

    visit: int
    name: str
    first_round: int
    last_round: int | None = None
    opened_by: str = "recipe"
    labels: tuple[str, ...] = ()
    test_examples: int | None = None


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """What clients scored on their held-out examples of one task.

    ``scope`` is ``client:3``, or ``class:phone`` for the mean over a device class, weighted by predictions. ``moment``
    is ``before`` for the model at the start of the round, ``shared`` for the model at its end. ``device_type`` is that
    of the device it was computed on; of a mean over several types, all of them, as in ``cpu+cuda``; None if not known.
    """

    scope: str
    moment: str
    task: str
    num_predictions: int
    accuracy: float
    loss: float
    device_type: str | None = None
