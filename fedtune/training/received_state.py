"""What a client's round begins with, and a round in which it only scores what it received."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtune.contribution import OwnScore
from fedtune.data import Encoded
from fedtune.errors import ContributionError
from fedtune.recipe import Recipe
from fedtune.seeds import derive
from fedtune.techniques import Technique, begin_round
from fedtune.techniques import own as own_names
from fedtune.training.evaluate import score_held_out
from fedtune.training.held_out import held_out
from fedtune.training.state import load_state
from fedtune.training.threads import processor_threads

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
        raise ContributionError(f"what the device keeps for itself does not fit the model: {odd}; remove its file")
    load_state(model, state)
    load_state(model, own)
    begin_round(techniques, model, number)


def score_received(
    model: nn.Module,
    techniques: Sequence[Technique],
    state: Mapping[str, Tensor],
    data: Encoded,
    indices: Rows,
    recipe: Recipe,
    number: int,
    client: int,
    own: Mapping[str, Tensor],
) -> OwnScore:
    """The score of ``state`` on the rows a client holds out, after round ``number``; nothing is trained."""
    _, held = held_out(indices, recipe.evaluation.own, derive(recipe.seed, client, "own"))
    receive_state(model, techniques, state, own, number)
    with processor_threads(recipe.train.threads), torch.random.fork_rng(devices=[]):
        return score_held_out(model, data, held, recipe, techniques)
