"""A step of a client's own model, beside the steps of the shared one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from fedtune.accelerator import find_device, fork_random_state
from fedtune.algorithms import AlgorithmRound, PersonalModel
from fedtune.data import EncodedDataset
from fedtune.techniques import StepInfo, before_optimiser_step
from fedtune.training.client_round import ClientRound
from fedtune.training.training_step import run_step

__all__ = ["take_personal_step", "use_personal_model"]


@contextmanager
def use_personal_model(client: ClientRound) -> Iterator[None]:
    """Let the model be the client's own one in the block, if the algorithm has any."""
    personal = client.algorithm_round.personal
    if personal is None:
        yield
        return
    with personal.use_values():
        yield


def take_personal_step(
    client: ClientRound, examples: EncodedDataset, rows: Sequence[int], info: StepInfo, micro_batch_size: int | None
) -> int | None:
    """Train the client's own model, if it has one, on a batch. Return the micro-batch size that fitted.

    The random numbers of the shared model's step do not depend on it.
    """
    personal = client.algorithm_round.personal
    if personal is None:
        return micro_batch_size
    with fork_random_state(find_device(client.model)):
        torch.manual_seed(client.derive_seed(f"personal step {info.step}"))
        return _take_step(personal, client, examples, rows, info, micro_batch_size)


def _take_step(
    personal: PersonalModel,
    client: ClientRound,
    examples: EncodedDataset,
    rows: Sequence[int],
    info: StepInfo,
    size: int | None,
) -> int | None:
    model, progress = client.model, (info.round - 1 + info.step / info.local_steps) / client.recipe.federation.rounds
    with personal.use_values():
        plain = replace(client, algorithm_round=AlgorithmRound())
        result = run_step(plain, examples, rows, progress, size, metered=False)
        if result.losses:
            personal.take_step(before_optimiser_step(client.techniques, model, info))
        model.zero_grad()
    return result.micro_batch_size
