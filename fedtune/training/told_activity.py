"""Activation statistics that clients send: sums of |x| and counts, which add up over clients and say nothing else."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtune import merging
from fedtune.contribution import Form
from fedtune.data import Encoded
from fedtune.merging import Activity, Measurement
from fedtune.recipe import Recipe
from fedtune.techniques import Technique
from fedtune.training.activity import Total, channels, mean, totals
from fedtune.training.calibration import few, inputs

__all__ = ["added_up", "asked_activity", "tell_activity"]

_SUMS, _COUNTS = "activity.sums", "activity.counts"


def asked_activity(model: nn.Module, recipe: Recipe, names: Collection[str]) -> dict[str, Form]:
    """What each client adds to its contribution in a round that trains ``names``; nothing unless the merge asks."""
    if _clients_measure(recipe) is None or not (places := channels(model, set(names))):
        return {}
    sums = Form((sum(place.size for place in places.values()),), negative=False)
    return {_SUMS: sums, _COUNTS: Form((len(places),), negative=False)}


def tell_activity(
    model: nn.Module,
    techniques: Sequence[Technique],
    data: Encoded,
    indices: NDArray[np.int64],
    recipe: Recipe,
    names: Collection[str],
    seed: int,
) -> dict[str, Tensor]:
    """On a client, before it trains: the sums over all channels of all weights end to end, and a count per weight."""
    asked = _clients_measure(recipe)
    if asked is None or not (places := channels(model, set(names))):
        return {}
    chosen = few(indices, asked.examples, seed)
    found = totals(model, places, inputs(data, chosen, recipe.evaluation.batch), techniques).values()
    counts = torch.tensor([float(total.count) for total in found])
    return {_SUMS: torch.cat([total.sums for total in found]).float(), _COUNTS: counts}


def added_up(model: nn.Module, names: Collection[str], told: Sequence[Mapping[str, Tensor]]) -> dict[str, Activity]:
    """On the server: what several clients told as one statistic, added in the order given."""
    places = channels(model, set(names))
    if not places or not told:
        return {}
    sums = sum((one[_SUMS].double() for one in told), torch.zeros(()))
    counts = sum((one[_COUNTS].double() for one in told), torch.zeros(()))
    parts = sums.split([place.size for place in places.values()])
    found = {name: Total(part, int(count)) for name, part, count in zip(places, parts, counts, strict=True)}
    return mean(places, found)


def _clients_measure(recipe: Recipe) -> Measurement | None:
    asked = merging.measurement(merging.choose(recipe.merge).steps)
    return asked if asked is not None and asked.by == "clients" else None
