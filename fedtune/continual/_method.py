"""The base class of continual methods, and the values that their hooks receive."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtune.continual._plan import Place
from fedtune.data import EncodedDataset
from fedtune.recipe.schema import Recipe
from fedtune.recipe.unit_registry import NamedUnit
from fedtune.tasks import Task
from fedtune.wire.client_update import TensorSpec

__all__ = ["Border", "BorderResult", "ContinualMethod", "MethodRound", "MethodSetup", "TaskUpload"]

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class MethodSetup:
    """What a method knows when a client's round begins, with the received state in the model.

    ``rows`` are the rows of ``examples`` that the client trains on. ``stored`` are the tensors that this method kept on
    the device in the newest earlier visit, by its number: whatever is needed of visits before must be among them.
    ``received`` is what the server sent of its memory. ``classes`` are the classes that the loss compares, None for
    all. ``derive_seed`` gives this client's seeds of this round, by purpose.

    ``all_rows`` are the client's examples of any task, as far as it has them now. ``list_classes`` returns the classes
    of some tasks, None for all; with ``neighbours``, also those that come with them in a blurred stream.
    ``run_forward`` returns the loss of a batch of other examples, as a training step computes it, and the model's
    logits.
    """

    model: nn.Module
    task: Task
    recipe: Recipe
    place: Place
    client: int
    examples: EncodedDataset
    rows: NDArray[np.int64]
    derive_seed: Callable[[str], int]
    stored: Mapping[int, Tensors] = field(default_factory=dict)
    received: Tensors = field(default_factory=dict)
    classes: Sequence[int] | None = None
    num_labels: int = 0
    micro_batch_size: int | None = None
    all_rows: NDArray[np.int64] | None = None
    list_classes: Callable[..., Sequence[int] | None] | None = None
    run_forward: Callable[[Tensors], tuple[Tensor, Tensor | None]] | None = None
    num_tasks: int = 0
    held_rows: Mapping[int, NDArray[np.int64]] = field(default_factory=dict)
    """The rows that the client would train on in each task that it has begun, as far as it still holds them."""


class MethodRound:
    """A method during one client's round. Every hook is optional."""

    def compute_batch_term(self, rows: Sequence[int], batch: Tensors, logits: Tensor | None) -> Tensor | None:
        """Return a term that is added to the loss of a micro-batch, before its backward pass.

        ``rows`` are its examples, and ``logits`` the model's outputs for them, None if the task has none.
        """
        return None

    def iter_memory_losses(self) -> Iterator[Tensor]:
        """Yield further losses of a step. Each is backpropagated before the next one is computed."""
        return iter(())

    def change_gradients(self) -> None:
        """Change the gradients of a step, after the backward passes and before they are clipped."""

    def compute_upload(self) -> dict[str, Tensor]:
        """Return the tensors of ``declare_upload``, after training in the last round of a visit."""
        return {}

    def list_stored_tensors(self) -> dict[str, Tensor]:
        """Return what the device keeps of this visit, after each of its rounds."""
        return {}


class TaskUpload(NamedTuple):
    """What a client uploaded at the end of a task, and its weight in the round."""

    client: int
    weight: float
    tensors: Tensors


@dataclass(frozen=True)
class Border:
    """The end of a task on the server: ``before`` is the state at its begin, ``after`` that of its last merge.

    ``start`` is the state before any training. ``memory`` are the tensors that this method kept on the server.
    ``uploads`` are in client order; there may be none, if the round failed.
    """

    recipe: Recipe
    model: nn.Module
    visit: int
    task: int
    round_number: int
    start: Tensors
    before: Tensors
    after: Tensors
    memory: Tensors
    uploads: Sequence[TaskUpload]
    label_names: Sequence[str] = ()


class BorderResult(NamedTuple):
    """The next shared state, and the whole memory that the method keeps on the server."""

    state: Tensors
    memory: Tensors


class ContinualMethod(NamedUnit):
    """One published way to keep what was learned. Its fields are its settings; every hook is optional."""

    needs_common_border: ClassVar[bool] = False
    """Whether all clients must end a task in the same round: it uses the state at the task's end."""
    uploads_statistics: ClassVar[bool] = False
    """Whether clients send more than their update, which ``privacy`` neither clips nor noises."""
    consolidates: ClassVar[bool] = False
    """Whether it merges the state at the end of a task; such a method is listed in ``stream.consolidate``."""
    uses_all_tasks: ClassVar[bool] = False
    """Whether every round trains on the examples of all tasks."""

    uploads_at_start: ClassVar[bool] = False
    """Whether clients upload in the first round of a visit too, for ``after_first_round``."""

    @property
    def label(self) -> str:
        """Its name in sentences."""
        return self.name

    def count_stored_bytes(self) -> int:
        """Return the bytes of the tensors that the method is set to keep on each device, as far as they are known."""
        return 0

    def check(self, recipe: Recipe) -> None:
        """Raise RecipeError if the method cannot do what the rest of the recipe asks."""

    def check_export(self) -> None:
        """Raise ModelError if no plain model can contain the result."""

    def rewrite_model(self, model: nn.Module, task: Task, recipe: Recipe) -> None:
        """Rewrite the loaded model before the techniques do; ModelError if it does not fit."""

    def trains(self, place: Place) -> bool:
        """Whether clients train in a round. In one without training they only upload statistics."""
        return True

    def begin_round(self, setup: MethodSetup) -> MethodRound:
        """Begin a client's round on the device."""
        return MethodRound()

    def declare_upload(self, model: nn.Module, recipe: Recipe, names: Sequence[str]) -> dict[str, TensorSpec]:
        """The tensors that each client adds to its update in the last round of a visit; ``names`` are trained.

        With ``uploads_at_start``, in the first round too.
        """
        return {}

    def after_first_round(self, border: Border) -> Tensors:
        """Return the next state, on the server, after the merge of a visit's first round, if others follow. It is pure.

        Only methods that upload at the start are asked. ``before`` is the state that the visit began with.
        """
        return border.after

    def after_task(self, border: Border) -> BorderResult:
        """Return the next state and the method's memory, on the server, when a task has ended. It is pure."""
        return BorderResult(border.after, border.memory)

    def start_task(self, start: Tensors, state: Tensors, memory: Tensors) -> Tensors:
        """Return the state that a later task's training starts from; ``start`` is that before any training."""
        return state

    def list_sent_memory(self, memory: Tensors, place: Place) -> list[str]:
        """The names of the server's memory tensors that clients receive in a round."""
        return []
