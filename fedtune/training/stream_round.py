"""A client's round in a stream of tasks: its place, its examples, its classes, and the methods that remember."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedtune.continual import ContinualMethod, Place
from fedtune.continual._drift_phases import Phase
from fedtune.recipe.stream_settings import Drift

__all__ = ["StreamRound", "TaskHoldout"]


class TaskHoldout(NamedTuple):
    """A client's held-out rows of one task, and the classes that the model may predict for them, None for all."""

    task: int
    rows: NDArray[np.int64]
    classes: Sequence[int] | None


@dataclass(frozen=True)
class StreamRound:
    """The part of a client's round that concerns the stream.

    ``rows`` are the examples of its task. ``classes`` are those that the loss compares, and ``seen_classes`` those that
    the model may predict, None for all. ``stored`` are the tensors of the newest earlier visit on the device, by its
    number, and ``received`` the server's memory; both are named by their method. ``uploading`` are the methods that
    upload tensors.

    ``all_rows`` are the client's examples of any task, and ``list_classes`` returns the classes of some tasks, None for
    all; with ``neighbours``, also those that come with them in a blurred stream. ``held_rows`` are its examples of each
    task begun, among ``num_tasks``. ``holdouts`` are scored one by one, if any. ``drift_phase`` says what the client
    sends for the drift signal besides its score.
    """

    place: Place
    rows: NDArray[np.int64]
    methods: Sequence[ContinualMethod]
    classes: Sequence[int] | None
    seen_classes: Sequence[int] | None
    num_labels: int
    uploading: Sequence[ContinualMethod] = ()
    stored: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)
    received: Mapping[str, Tensor] = field(default_factory=dict)
    all_rows: NDArray[np.int64] | None = None
    list_classes: Callable[..., Sequence[int] | None] | None = None
    num_tasks: int = 0
    held_rows: Mapping[int, NDArray[np.int64]] = field(default_factory=dict)
    holdouts: Sequence[TaskHoldout] = ()
    drift: Drift | None = None
    drift_phase: Phase | None = None
