"""Activation statistics that clients upload: sums of |x| and counts, which are added over clients."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtune import merging
from fedtune.data.sampling import iter_inputs, sample_rows
from fedtune.merging import (
    ActivationStatistics,
    ActivationSums,
    CalibrationRequest,
    average_activations,
    find_input_channels,
    sum_activations,
)
from fedtune.recipe.schema import Recipe
from fedtune.training.client_round import ClientRound
from fedtune.wire.client_update import TensorSpec

__all__ = ["compute_uploaded_statistics", "declare_uploaded_statistics", "sum_uploaded_statistics"]

_SUMS, _COUNTS = "activity.sums", "activity.counts"


def declare_uploaded_statistics(model: nn.Module, recipe: Recipe, names: Collection[str]) -> dict[str, TensorSpec]:
    """Return the extra tensors of a client update in a round that trains ``names``; empty unless the merge needs
    them.
    """
    if _client_measurement(recipe) is None or not (places := find_input_channels(model, set(names))):
        return {}
    sums = TensorSpec((sum(place.size for place in places.values()),), negative=False)
    return {_SUMS: sums, _COUNTS: TensorSpec((len(places),), negative=False)}


def compute_uploaded_statistics(
    client: ClientRound, rows: NDArray[np.int64], names: Collection[str]
) -> dict[str, Tensor]:
    """On a client, before training, return the sums of all channels of all weights, concatenated, and a count per
    weight.
    """
    request = _client_measurement(client.recipe)
    if request is None or not (places := find_input_channels(client.model, set(names))):
        return {}
    chosen = sample_rows(rows, request.calibration_examples, client.derive_seed("activity"))
    inputs = iter_inputs(client.examples, chosen, client.recipe.evaluation.batch_size)
    found = sum_activations(client.model, places, inputs, client.techniques).values()
    counts = torch.tensor([float(total.count) for total in found])
    return {_SUMS: torch.cat([total.sums for total in found]).float(), _COUNTS: counts}


def sum_uploaded_statistics(
    model: nn.Module, names: Collection[str], uploads: Sequence[Mapping[str, Tensor]]
) -> dict[str, ActivationStatistics]:
    """On the server, add the statistics of several clients in the given order and return them as means."""
    places = find_input_channels(model, set(names))
    if not places or not uploads:
        return {}
    sums = sum((one[_SUMS].double() for one in uploads), torch.zeros(()))
    counts = sum((one[_COUNTS].double() for one in uploads), torch.zeros(()))
    parts = sums.split([place.size for place in places.values()])
    found = {name: ActivationSums(part, int(count)) for name, part, count in zip(places, parts, counts, strict=True)}
    return average_activations(places, found)


def _client_measurement(recipe: Recipe) -> CalibrationRequest | None:
    request = merging.build_calibration_request(merging.build_pipeline(recipe.merge).steps)
    return request if request is not None and request.calibrate_on == "clients" else None
