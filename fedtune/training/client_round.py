"""One client's round as a value: what it trains or scores, on which examples, and by which recipe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtune.data import EncodedDataset
from fedtune.recipe.schema import Recipe
from fedtune.seeds import derive_seed
from fedtune.tasks import Task, get_task
from fedtune.techniques import Technique
from fedtune.training.holdout_split import split_holdout

__all__ = ["ClientRound"]


@dataclass(frozen=True)
class ClientRound:
    """A client's work in round ``number`` (1, 2, ...): ``rows`` of ``examples`` are the client's.

    ``local_tensors`` are all tensors that the device keeps for itself. At most ``micro_batch_size`` examples go through
    the model at a time; the batch stays what it is.
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

    @property
    def task(self) -> Task:
        """The recipe's task."""
        return get_task(self.recipe.task)

    def split_rows(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows to train on, and rows that are held out: the same in every round."""
        return split_holdout(
            self.rows, self.recipe.evaluation.local_holdout, derive_seed(self.recipe.seed, self.client, "own")
        )

    def derive_seed(self, purpose: str) -> int:
        """The seed of this client's random numbers in this round."""
        return derive_seed(self.recipe.seed, self.number, self.client, purpose)
