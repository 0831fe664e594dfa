"""The inputs of one client's round: the model, the recipe and the client's examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtune.algorithms import AlgorithmRound
from fedtune.continual import MethodRound
from fedtune.data import EncodedDataset
from fedtune.recipe.schema import Recipe
from fedtune.seeds import derive_seed
from fedtune.tasks import Task, get_task
from fedtune.techniques import StepEstimator, Technique
from fedtune.training.algorithm_inputs import AlgorithmInputs
from fedtune.training.holdout_split import split_holdout
from fedtune.training.stream_round import StreamRound

__all__ = ["ClientRound"]


@dataclass(frozen=True)
class ClientRound:
    """A client's training or evaluation in round ``number`` (1, 2, ...) on the ``rows`` of ``examples`` that it holds.

    ``local_tensors`` are all tensors that stay on the device. At most ``micro_batch_size`` examples pass through the
    model at a time; the batch size does not change.
    """

    model: nn.Module
    techniques: Sequence[Technique]
    recipe: Recipe
    examples: EncodedDataset
    rows: NDArray[np.int64]
    number: int
    client: int
    local_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    micro_batch_size: int | None = None
    stream: StreamRound | None = None
    method_rounds: Sequence[MethodRound] = ()
    """The continual methods, once the round has begun."""
    algorithm: AlgorithmInputs | None = None
    algorithm_round: AlgorithmRound = field(default_factory=AlgorithmRound)
    """The algorithm, once the round has begun."""
    estimator: StepEstimator | None = None
    """What takes steps without a backward pass, once the round has begun; None if there is one."""

    @property
    def task(self) -> Task:
        """The recipe's task."""
        return get_task(self.recipe.task)

    @property
    def trains(self) -> bool:
        """Whether the round trains. In a stream, a method may want nothing to move."""
        stream = self.stream
        return stream is None or all(method.trains(stream.place) for method in stream.methods)

    def split_rows(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the rows to train on and the held-out rows, the same in every round."""
        return split_holdout(
            self.rows, self.recipe.evaluation.local_holdout, derive_seed(self.recipe.seed, self.client, "own")
        )

    def derive_seed(self, purpose: str) -> int:
        """Derive the seed of this client's random numbers in this round."""
        return derive_seed(self.recipe.seed, self.number, self.client, purpose)
