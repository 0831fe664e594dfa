"""Loads the state a client received, and evaluates it without training."""

from collections.abc import Mapping

from torch import Tensor

from fedtune.accelerator import find_device, fork_random_state
from fedtune.errors import ClientUpdateError
from fedtune.techniques import begin_round, list_local_tensors
from fedtune.training.client_round import ClientRound
from fedtune.training.cpu_threads import use_cpu_threads
from fedtune.training.evaluation import score_held_out
from fedtune.training.model_state import set_model_state
from fedtune.training.stream_training import mask_seen_classes
from fedtune.training.task_holdouts import score_task_holdouts
from fedtune.wire.client_update import HoldoutMetrics
from fedtune.wire.task_figures import TaskFigures

__all__ = ["receive_state", "score_received"]


def receive_state(client: ClientRound, state: Mapping[str, Tensor]) -> None:
    """Load the shared state and the device's local tensors into the model, and begin the client's round."""
    wanted = set(list_local_tensors(client.model))
    if client.local_tensors.keys() != wanted:
        odd = min(client.local_tensors.keys() ^ wanted)
        raise ClientUpdateError(f"what the device keeps for itself does not fit the model: {odd}; remove its file")
    set_model_state(client.model, state)
    set_model_state(client.model, client.local_tensors)
    begin_round(client.techniques, client.model, client.number)


def score_received(client: ClientRound, state: Mapping[str, Tensor]) -> tuple[HoldoutMetrics, TaskFigures | None]:
    """Return the metrics of ``state``, the result of a round, on the client's held-out rows. Nothing is trained.

    In a stream, those of each task come with them.
    """
    _, held_out = client.split_rows()
    receive_state(client, state)
    threads, device = client.recipe.train.threads, find_device(client.model)
    with use_cpu_threads(threads), fork_random_state(device):
        with mask_seen_classes(client):
            score = score_held_out(client, held_out.tolist())
        return score, score_task_holdouts(client)
