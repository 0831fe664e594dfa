"""What the recipe's algorithm changes in a client's round."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedtune import algorithms
from fedtune.algorithms import AlgorithmSetup
from fedtune.techniques import list_kept_tensors, list_low_rank_pairs, list_trainable_tensors
from fedtune.training.client_round import ClientRound
from fedtune.training.model_state import named_tensors
from fedtune.training.optimisers import make_optimiser
from fedtune.training.stream_training import mask_trained_classes, run_forward

__all__ = ["AlgorithmEnd", "begin_algorithm", "end_algorithm"]


class AlgorithmEnd(NamedTuple):
    """What a client uploads for the algorithm, by its name, and what its device keeps."""

    upload: Mapping[str, Tensor] = {}
    stored: Mapping[str, Tensor] = {}


def begin_algorithm(client: ClientRound, received: Collection[str] = ()) -> ClientRound:
    """Return the round with its algorithm, which sees the received state in the model. ``received`` are its names."""
    inputs = client.algorithm
    if inputs is None:
        return client
    trained, (rows, _) = set(list_trainable_tensors(client.model)), client.split_rows()
    kept = set(list_kept_tensors(client.model))
    setup = AlgorithmSetup(
        model=client.model,
        recipe=client.recipe,
        parameters={name: one for name, one in client.model.named_parameters() if name in trained},
        examples=client.examples,
        rows=rows,
        batch_size=client.micro_batch_size or client.recipe.train.batch_size,
        run_forward=partial(run_forward, client),
        stored=inputs.stored,
        received=inputs.received,
        resting=_select_resting(client.model, {*received} - trained - kept),
        statistics={name: one for name, one in client.model.named_buffers() if name in trained},
        kept={name: one for name, one in client.model.named_parameters() if name in kept},
        pairs=list_low_rank_pairs(client.techniques, client.model),
        make_optimiser=partial(make_optimiser, client.recipe.train),
    )
    with mask_trained_classes(client):
        return replace(client, algorithm_round=inputs.algorithm.begin_round(setup))


def _select_resting(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    return {name: one for name, one in named_tensors(model).items() if name in names and one.is_floating_point()}


def end_algorithm(client: ClientRound, delta: Mapping[str, Tensor]) -> AlgorithmEnd:
    """Return what the algorithm makes of the trained deltas."""
    if client.algorithm is None:
        return AlgorithmEnd()
    end = client.algorithm_round.end_round(delta)
    upload, stored = ({name: _to_wire(one) for name, one in part.items()} for part in end)
    return AlgorithmEnd(algorithms.name_tensors(client.algorithm.algorithm, upload), stored)


def _to_wire(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32)
