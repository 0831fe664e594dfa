"""The server's own examples, and the update that it trains on them, as a client would."""

import numpy as np
from torch import Tensor

from fedtune.data import EncodedDataset
from fedtune.data.sampling import sample_rows
from fedtune.errors import RecipeError
from fedtune.merging import CombineStep, FlTrust
from fedtune.seeds import derive_seed
from fedtune.server.scoring import State
from fedtune.training import ClientRound, RunContext, train_local_model

__all__ = ["RootData", "make_root_data"]


class RootData:
    """The root examples of a run, which are the same in every round.

    They are read before any training, because some tasks need the untrained model to encode examples.
    """

    def __init__(self, context: RunContext, settings: FlTrust) -> None:
        self._context, self._examples = context, _read_examples(context, settings.root_data)
        if not len(self._examples):
            raise RecipeError(
                f"merge: fltrust: root_data {settings.root_data} has no examples; name a source that has some"
            )
        seed = derive_seed(context.recipe.seed, "root-data")
        self._rows = np.array(sample_rows(np.arange(len(self._examples)), settings.root_examples, seed))

    def train_update(self, state: State, round_number: int) -> dict[str, Tensor]:
        """Return the deltas that local training on the root examples gives, from the state of a round."""
        context = self._context
        everything = context.recipe.evaluation.model_copy(update={"local_holdout": 0.0, "clients": None})
        recipe = context.recipe.get_round_recipe(round_number).model_copy(update={"evaluation": everything})
        number_of_nobody = recipe.num_clients
        client = ClientRound(
            context.model, context.techniques, recipe, self._examples, self._rows, round_number, number_of_nobody
        )
        return train_local_model(client, state).delta


def make_root_data(context: RunContext, combine: CombineStep) -> RootData | None:
    """Return the root data of a merge that needs it; None for others."""
    return RootData(context, combine) if isinstance(combine, FlTrust) else None


def _read_examples(context: RunContext, source: str | None) -> EncodedDataset:
    if source is None or source == "validation":
        return context.validation
    return context.encode_source(source, context.recipe.data.columns.model_dump(exclude_defaults=True))
