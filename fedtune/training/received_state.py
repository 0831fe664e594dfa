"""What a client's round begins with, and a round in which it only scores what it received."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtune.data import EncodedDataset
from fedtune.errors import ClientUpdateError
from fedtune.recipe.schema import Recipe
from fedtune.seeds import derive_seed
from fedtune.techniques import Technique, begin_round
from fedtune.techniques import list_local_tensors as own_names
from fedtune.training.cpu_threads import use_cpu_threads
from fedtune.training.evaluation import score_held_out
from fedtune.training.holdout_split import split_holdout
from fedtune.training.model_state import set_model_state
from fedtune.wire.client_update import HoldoutMetrics

__all__ = ["receive_state", "score_received"]

Rows = NDArray[np.int64]


def receive_state(
    model: nn.Module,
    techniques: Sequence[Technique],
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    number: int,
) -> None:
    """Load what is shared and what the device keeps for itself, and begin round ``number``."""
    if own.keys() != set(own_names(model)):
        odd = min(own.keys() ^ set(own_names(model)))
        raise ClientUpdateError(f"what the device keeps for itself does not fit the model: {odd}; remove its file")
    set_model_state(model, state)
    set_model_state(model, own)
    begin_round(techniques, model, number)


def score_received(
    model: nn.Module,
    techniques: Sequence[Technique],
    state: Mapping[str, Tensor],
    data: EncodedDataset,
    indices: Rows,
    recipe: Recipe,
    number: int,
    client: int,
    own: Mapping[str, Tensor],
) -> HoldoutMetrics:
    """The score of ``state`` on the rows a client holds out, after round ``number``; nothing is trained."""
    _, held = split_holdout(indices, recipe.evaluation.local_holdout, derive_seed(recipe.seed, client, "own"))
    receive_state(model, techniques, state, own, number)
    with use_cpu_threads(recipe.train.threads), torch.random.fork_rng(devices=[]):
        return score_held_out(model, data, held, recipe, techniques)
