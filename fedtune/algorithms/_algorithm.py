"""The base class of algorithms, and the values that their hooks receive."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtune.algorithms._personal_model import Optimiser, PersonalModel, refuse_optimiser
from fedtune.data import EncodedDataset
from fedtune.errors import RecipeError
from fedtune.merging import MergePipeline
from fedtune.recipe.schema import Recipe
from fedtune.recipe.unit_registry import NamedUnit
from fedtune.wire.client_update import ClientUpdate, LowRankPair, TensorSpec

__all__ = [
    "Algorithm",
    "AlgorithmRound",
    "AlgorithmSetup",
    "MergedUpdates",
    "RoundEnd",
    "ServerResult",
    "Weighing",
    "read_upload",
]

Tensors = Mapping[str, Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class AlgorithmSetup:
    """What an algorithm knows when a client's round begins, with the received state in the model.

    ``rows`` are the rows of ``examples`` that the client trains on, of which ``batch_size`` pass at once.
    ``parameters`` are those that it trains and sends. ``stored`` is what the device kept after the last of its rounds
    whose update was merged, and ``received`` is what the server sent of its own memory; both are empty at first.
    ``run_forward`` returns the loss of a batch, as a training step computes it, and the model's logits.
    ``statistics`` are running statistics that it updates and sends, ``resting`` the tensors that it received and does
    not train in this round, such as the other factor of a low-rank pair, ``kept`` the parameters that the algorithm
    keeps on the device, and ``pairs`` the low-rank pairs of the model. ``make_optimiser`` returns an optimiser as the
    recipe wants it.
    """

    model: nn.Module
    recipe: Recipe
    parameters: Mapping[str, nn.Parameter]
    examples: EncodedDataset
    rows: NDArray[np.int64]
    batch_size: int
    run_forward: Callable[[Tensors], tuple[Tensor, Tensor | None]]
    stored: Tensors = field(default_factory=dict)
    received: Tensors = field(default_factory=dict)
    statistics: Tensors = field(default_factory=dict)
    resting: Tensors = field(default_factory=dict)
    kept: Mapping[str, nn.Parameter] = field(default_factory=dict)
    pairs: Sequence[LowRankPair] = ()
    make_optimiser: Callable[[Sequence[nn.Parameter]], Optimiser] = refuse_optimiser


class RoundEnd(NamedTuple):
    """What a client uploads besides its deltas, and what its device keeps for later rounds."""

    upload: Mapping[str, Tensor] = {}
    stored: Mapping[str, Tensor] = {}


class AlgorithmRound:
    """An algorithm during one client's round. Every hook is optional; without any, it is FedAvg."""

    personal: PersonalModel | None = None
    """The client's own model, which takes each step before the shared one does."""

    @contextmanager
    def change_model(self) -> Iterator[None]:
        """Change what the model computes while it trains."""
        yield

    def begin_step(self, step: int, local_steps: int) -> None:
        """Called before each step with its number 0, 1, ... and that of all steps of the round."""

    def compute_batch_terms(self, batch: Tensors) -> list[Tensor]:
        """Return terms that are added to the loss of a micro-batch, after its forward pass."""
        return []

    def change_gradients(self) -> None:
        """Change the gradients of a step, after the backward passes and before they are clipped."""

    def record_step(self, lr: float) -> None:
        """Called after the optimiser's step, with its learning rate."""

    def end_round(self, delta: Tensors) -> RoundEnd:
        """Return what is uploaded and stored; ``delta`` are the trained minus the received values, on the CPU."""
        return RoundEnd()


class Weighing(NamedTuple):
    """The updates of a round with the weights that the merge gives them, in client order.

    ``shapes`` are those of all trained tensors.
    """

    recipe: Recipe
    shapes: Mapping[str, Shape]
    updates: Sequence[ClientUpdate]
    weights: Sequence[float]


class MergedUpdates(NamedTuple):
    """A merged round on the server: the state before and after the merge, and the updates, in client order.

    ``memory`` is what the algorithm kept after the last merge. ``parameters`` have the shapes of the trained ones.
    """

    before: Tensors
    after: Tensors
    parameters: Mapping[str, Shape]
    updates: Sequence[ClientUpdate]
    memory: Tensors
    num_clients: int


class ServerResult(NamedTuple):
    """The next shared state, and the whole memory that the algorithm keeps on the server."""

    state: Tensors
    memory: Tensors


class Algorithm(NamedUnit):
    """One published way to correct what clients train, or what their updates count. Its fields are its settings."""

    sends_more: ClassVar[bool] = False
    """Whether clients send more than their deltas, or the server keeps sums of them, which ``privacy`` does not cover.
    """
    remembers: ClassVar[bool] = False
    """Whether devices keep tensors from round to round."""
    fits_one_loss: ClassVar[bool] = False
    """Whether what is kept belongs to the gradients of one loss at entries that stay the same."""
    needs_one_start: ClassVar[bool] = False
    """Whether the updates of a round must be changes to one state, as they are not where late updates are merged."""
    needs_exact_updates: ClassVar[bool] = False
    """Whether the server adds up updates that devices add up too, so that both must count the same ones."""
    needs_sgd: ClassVar[bool] = False
    """Whether it computes with the steps of SGD."""
    changes_gradients: ClassVar[bool] = False
    """Whether it changes gradients before a step."""
    keeps_tensors: ClassVar[bool] = False
    """Whether trained tensors stay on the devices, so that the server's state is not a whole model."""
    has_personal_model: ClassVar[bool] = False
    """Whether each client trains a model of its own beside the shared one."""
    copies: ClassVar[int] = 0
    """How many more copies of what is trained the training holds, for the estimates of memory."""
    weighs_equally: ClassVar[bool] = False
    """Whether all updates of a round count alike, whatever their number of examples."""

    def check(self, recipe: Recipe, pipeline: MergePipeline) -> None:
        """Raise RecipeError if the algorithm cannot do what the rest of the recipe asks."""

    def check_model(self, model: nn.Module) -> None:
        """Raise ModelError if the algorithm does not fit the model."""

    def select_kept(self, model: nn.Module, trained: Sequence[str], pairs: Sequence[LowRankPair]) -> list[str]:
        """Return the names of the ``trained`` tensors that stay on the devices; ModelError if they are none or all."""
        return []

    def describe_export(self) -> str:
        """Return a sentence about what an exported model lacks, or an empty text."""
        return ""

    def begin_round(self, setup: AlgorithmSetup) -> AlgorithmRound:
        """Begin a client's round on the device."""
        return AlgorithmRound()

    def declare_upload(self, parameters: Mapping[str, Shape]) -> dict[str, TensorSpec]:
        """The tensors that each client adds to its update, given the shapes of the parameters it trains."""
        return {}

    def compute_scales(self, weighing: Weighing) -> list[float]:
        """Return a factor for the deltas of each client, on the server, before they are merged."""
        return [1.0] * len(weighing.updates)

    def after_merge(self, merged: MergedUpdates) -> ServerResult:
        """Return the next state and the algorithm's memory, on the server. It is pure."""
        return ServerResult(merged.after, merged.memory)

    def list_sent_memory(self, memory: Tensors, parameters: Sequence[str]) -> list[str]:
        """The names of the server's memory tensors that clients receive in a round that trains ``parameters``."""
        return []

    def require_mean(self, pipeline: MergePipeline) -> None:
        """Raise RecipeError unless the merge is a mean of the updates."""
        if not pipeline.combine.averages:
            raise RecipeError(
                f"federation.algorithm: {self.name} computes with the mean of the updates, and {pipeline.combine.name} "
                "gives another result; merge by mean"
            )


def read_upload(name: str, update: ClientUpdate, tensor: str) -> Tensor:
    """Return a tensor that a client uploaded for the algorithm ``name``."""
    return update.read_tensors([f"{name}/{tensor}"])[f"{name}/{tensor}"]
