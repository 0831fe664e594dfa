"""Clients score the state after a round on their held-out examples, whether or not they trained in the round."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from fedtune.errors import ClientUpdateError
from fedtune.flower.exchange import stream_replies
from fedtune.recipe.schema import Recipe
from fedtune.seeds import derive_seed
from fedtune.server.class_payloads import RoundPayloads
from fedtune.server.downloads import Downloads
from fedtune.server.events import Unscored, emit_event
from fedtune.server.federated_evaluation import ScoredClient, list_client_scores
from fedtune.server.replies import read_error
from fedtune.server.reports import read_score
from fedtune.server.run_clients import RunClients
from fedtune.server.scheduling.round_scheduler import DEVICE_REMOVED, NO_REPLY_BEFORE_DEADLINE
from fedtune.server.sending import Sending
from fedtune.server.spool import open_spool
from fedtune.server.task_ledger import ClientFigures, list_task_scores
from fedtune.tracking import ClientScore, TaskScore
from fedtune.training import RunContext
from fedtune.untrusted import clean_text
from fedtune.wire.client_update import FEWEST, ClientReport

__all__ = ["ClientScoring", "draw_scorers"]

State = Mapping[str, Tensor]

_LEAST_SECONDS = 300.0
"""The deadline for scores on devices without a deadline in the recipe, or the seconds of the round if longer.

A device that has not trained yet must load the model and the data first.
"""


class SharedScores(NamedTuple):
    """What clients scored of a shared state: over all their held-out examples, and in a stream of each task."""

    clients: tuple[ClientScore, ...] = ()
    tasks: tuple[TaskScore, ...] = ()


@dataclass(frozen=True)
class ClientScoring:
    """Requests scores of a shared state from the clients of one run."""

    grid: Grid
    context: RunContext
    run_id: str
    sending: Sending

    def score_by_clients(
        self, clients: RunClients, state: State, round_number: int, round_seconds: float
    ) -> SharedScores:
        """Return the scores of the clients that ``evaluation.clients`` selects.

        Devices that are offline get no request, and replies after the deadline are ignored. An event names the clients
        that sent no scores, with the reasons. ``round_seconds`` is the duration of the round.
        """
        recipe, connected = self.context.recipe, _list_connected_clients(self.grid, clients)
        scorers = draw_scorers(recipe, connected, last=round_number == recipe.federation.rounds)
        if not scorers:
            return SharedScores()
        deadline = _choose_deadline(self.context.recipe, clients, round_seconds)
        found = self._request_scores(clients, scorers, RoundPayloads(self.context, state, round_number), deadline)
        reasons = {
            f"client {one} ({clients.devices[one].label})": said for one, said in found.items() if isinstance(said, str)
        }
        if reasons:
            emit_event(Unscored(round_number, len(scorers), reasons))
        scored = {client: said for client, said in found.items() if isinstance(said, ClientReport)}
        metrics, task = self.context.recipe.evaluation.metrics, self.context.task
        whole = [(ScoredClient(client, one.scoring_device_type), one.holdout_metrics) for client, one in scored.items()]
        told = [
            ClientFigures(client, clients.devices[client].device_class, one.task_figures, one.scoring_device_type)
            for client, one in scored.items()
            if one.task_figures is not None
        ]
        return SharedScores(
            tuple(
                one
                for client, score in whole
                if score is not None
                for one in list_client_scores(client, "shared", score, metrics, task)
            ),
            list_task_scores(self.context, "shared", told),
        )

    def _request_scores(
        self, clients: RunClients, scorers: Sequence[int], payloads: RoundPayloads, deadline: float | None
    ) -> dict[int, ClientReport | str]:
        """Return the score of each client, or the reason why there is none, in client order."""
        found: dict[int, ClientReport | str] = dict.fromkeys(scorers, NO_REPLY_BEFORE_DEADLINE)

        def note_removed(client: int) -> None:
            found[client] = DEVICE_REMOVED

        plan = self.context.stream_plan
        num_tasks = 0 if plan is None else len(plan.task_names)
        with open_spool(self.run_id, payloads.round_number) as spool:
            folder = spool if clients.shares_disk else None
            downloads = Downloads(payloads, self.sending.bases, folder, deployed=False)
            messages = self.sending.scoring_messages(scorers, clients, downloads)
            for client, reply in stream_replies(self.grid, messages, deadline, clients.poll, note_removed):
                found[client] = _read(reply, num_tasks)
        return found


def draw_scorers(recipe: Recipe, among: Sequence[int], *, last: bool = False) -> list[int]:
    """Return the clients that score, in ascending order.

    After the ``last`` round of a stream, these are all that hold examples out: the ledger of a client ends with it.

    All clients are ranked by the seed, and the first ones that are in ``among`` are taken. The choice is therefore the
    same after each round as long as these clients are online.
    """
    wanted = recipe.evaluation.clients
    if wanted is None and last and recipe.stream and recipe.evaluation.local_holdout and recipe.privacy is None:
        wanted = "all"
    if wanted is None:
        return []
    if wanted == "all":
        return sorted(among)
    ranked = np.random.default_rng(derive_seed(recipe.seed, "scorers")).permutation(recipe.num_clients).tolist()
    there = set(among)
    return sorted([client for client in ranked if client in there][:wanted])


def _list_connected_clients(grid: Grid, clients: RunClients) -> list[int]:
    """Return the eligible clients without those whose device is offline."""
    if not clients.deployed:
        return list(clients.eligible)
    connected = set(grid.get_node_ids())
    return [client for client in clients.eligible if clients.node_ids[client] in connected]


def _choose_deadline(recipe: Recipe, clients: RunClients, round_seconds: float) -> float | None:
    """Return the seconds to wait; None in a simulation, where every client replies."""
    if not clients.deployed:
        return None
    return recipe.federation.deadline or max(_LEAST_SECONDS, round_seconds)


def _read(reply: Message, num_tasks: int) -> ClientReport | str:
    """Return the score in a reply, or the reason why there is none."""
    if reply.has_error():
        return ": ".join(read_error(reply.error))
    try:
        score = read_score(reply.content.metric_records.get("report"), num_tasks)
    except ClientUpdateError as error:
        return f"refused: {clean_text(error)}"
    if score.holdout_metrics is None and score.task_figures is None:
        return f"it has fewer than {FEWEST} held-out examples"
    return score
