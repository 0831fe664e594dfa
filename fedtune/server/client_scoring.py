"""Clients score the state a round ended with on what they hold out, whether or not the round asked them to train."""

from collections.abc import Mapping, Sequence

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
from fedtune.server.federated_evaluation import figures_of
from fedtune.server.replies import read_error
from fedtune.server.reports import read_score
from fedtune.server.run_clients import RunClients
from fedtune.server.scheduling.round_scheduler import DEVICE_REMOVED, NO_REPLY_BEFORE_DEADLINE
from fedtune.server.sending import Sending
from fedtune.server.spool import open_spool
from fedtune.tracking import ClientScore
from fedtune.training import RunContext
from fedtune.untrusted import clean_text
from fedtune.wire.client_update import FEWEST, HoldoutMetrics

__all__ = ["draw_scorers", "score_by_clients"]

State = Mapping[str, Tensor]

_LEAST_SECONDS = 300.0
"""Devices get so long to score where the recipe names no deadline, or as long as the round took, if that is longer.

A device that has not trained yet loads model and data first.
"""


def score_by_clients(
    grid: Grid, shop: RunContext, run: str, sending: Sending, crew: RunClients, state: State, number: int, took: float
) -> tuple[ClientScore, ...]:
    """Figures of the shared state by each client that ``evaluation.clients`` asks for after round ``number``.

    ``took`` is how many seconds the round has taken. Devices that are away are not asked, nor waited for after the
    deadline; whoever gives no figures is told to the watcher, with the reason.
    """
    clients = draw_scorers(shop.recipe, _connected(grid, crew))
    if not clients:
        return ()
    answers = _ask(grid, shop, run, sending, crew, clients, state, number, took)
    reasons = {
        f"client {one} ({crew.devices[one].label})": said for one, said in answers.items() if isinstance(said, str)
    }
    if reasons:
        emit_event(Unscored(number, len(clients), reasons))
    scored = [(client, said) for client, said in answers.items() if isinstance(said, HoldoutMetrics)]
    metrics = shop.recipe.evaluation.metrics
    return tuple(one for client, score in scored for one in figures_of(client, "shared", score, metrics))


def _ask(
    grid: Grid,
    shop: RunContext,
    run: str,
    sending: Sending,
    crew: RunClients,
    clients: Sequence[int],
    state: State,
    number: int,
    took: float,
) -> dict[int, HoldoutMetrics | str]:
    """The score of each client, or why there is none, in client order."""
    answers: dict[int, HoldoutMetrics | str] = dict.fromkeys(clients, NO_REPLY_BEFORE_DEADLINE)

    def note_removed(client: int) -> None:
        answers[client] = DEVICE_REMOVED

    with open_spool(run, number) as spool:
        folder = spool if crew.shares_disk else None
        downloads = Downloads(RoundPayloads(shop, state, number), sending.bases, folder, deployed=False)
        messages = sending.scoring_messages(clients, crew, downloads)
        for client, reply in stream_replies(
            grid, messages, _deadline(shop.recipe, crew, took), crew.poll, note_removed
        ):
            answers[client] = _read(reply)
    return answers


def draw_scorers(recipe: Recipe, among: Sequence[int]) -> list[int]:
    """The clients that score, in ascending order: the same after each round, as long as they are there.

    Clients are ranked by seed, and the first of those ``among`` are taken.
    """
    wanted = recipe.evaluation.clients
    if wanted is None:
        return []
    if wanted == "all":
        return sorted(among)
    ranked = np.random.default_rng(derive_seed(recipe.seed, "scorers")).permutation(recipe.num_clients).tolist()
    there = set(among)
    return sorted([client for client in ranked if client in there][:wanted])


def _connected(grid: Grid, crew: RunClients) -> list[int]:
    """The clients that may be asked, without devices that are away."""
    if not crew.deployed:
        return list(crew.eligible)
    there = set(grid.get_node_ids())
    return [client for client in crew.eligible if crew.node_ids[client] in there]


def _deadline(recipe: Recipe, crew: RunClients, took: float) -> float | None:
    """Seconds to wait; no end in a simulation: its deadlines are in simulated time, and every client answers."""
    if not crew.deployed:
        return None
    return recipe.federation.deadline or max(_LEAST_SECONDS, took)


def _read(reply: Message) -> HoldoutMetrics | str:
    """A client's score, or why there is none."""
    if reply.has_error():
        return ": ".join(read_error(reply.error))
    try:
        score = read_score(reply.content.metric_records.get("report"))
    except ClientUpdateError as error:
        return f"refused: {clean_text(error)}"
    return score if score.num_predictions else f"it holds out fewer than {FEWEST} examples"
