"""The server's own examples, and the update that it trains on them, as a client would."""

from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedtune.data import EncodedDataset
from fedtune.data.sampling import sample_rows
from fedtune.merging import CombineStep, FlTrust
from fedtune.seeds import derive_seed
from fedtune.server.scoring import State
from fedtune.training import ClientRound, RunContext, train_local_model

__all__ = ["RootData", "make_root_data"]


class _Rows(NamedTuple):
    examples: EncodedDataset
    rows: NDArray[np.int64]


class RootData:
    """The root examples of a run, which are the same in every round. They are read when they are first used."""

    def __init__(self, context: RunContext, settings: FlTrust) -> None:
        self._context, self._settings = context, settings

    @cached_property
    def _chosen(self) -> _Rows:
        recipe, source = self._context.recipe, self._settings.root_data
        if source is None or source == "validation":
            examples = self._context.validation
        else:
            examples = self._context.encode_source(source, recipe.data.columns.model_dump(exclude_defaults=True))
        seed = derive_seed(recipe.seed, "root-data")
        chosen = sample_rows(np.arange(len(examples)), self._settings.root_examples, seed)
        return _Rows(examples, np.asarray(chosen))

    def train_update(self, state: State, round_number: int) -> dict[str, Tensor]:
        """Return the deltas that local training on the root examples gives, from the state of a round."""
        context, (examples, rows) = self._context, self._chosen
        everything = context.recipe.evaluation.model_copy(update={"local_holdout": 0.0, "clients": None})
        recipe = context.recipe.get_round_recipe(round_number).model_copy(update={"evaluation": everything})
        number_of_nobody = recipe.num_clients
        client = ClientRound(context.model, context.techniques, recipe, examples, rows, round_number, number_of_nobody)
        return train_local_model(client, state).delta


def make_root_data(context: RunContext, combine: CombineStep) -> RootData | None:
    """Return the root data of a merge that needs it; None for others."""
    return RootData(context, combine) if isinstance(combine, FlTrust) else None
