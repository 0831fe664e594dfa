"""Clients score the state a round ended with on what they hold out, whether or not the round asked them to train."""

from collections.abc import Mapping, Sequence

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from fedtune.contribution import FEWEST, OwnScore
from fedtune.errors import ContributionError
from fedtune.recipe import Recipe
from fedtune.seeds import derive
from fedtune.server.asking import DEVICE_REMOVED, NO_REPLY_IN_TIME
from fedtune.server.crew import Crew
from fedtune.server.exchange import replies
from fedtune.server.orders import make_messages
from fedtune.server.own_scores import figures_of
from fedtune.server.parts import Parts
from fedtune.server.receive import read_error
from fedtune.server.reports import read_score
from fedtune.server.spool import spooling
from fedtune.server.watch import Unscored, tell
from fedtune.tracking import ClientScore
from fedtune.training import Workshop
from fedtune.untrusted import clean_text

__all__ = ["draw_scorers", "score_by_clients"]

State = Mapping[str, Tensor]

_LEAST_SECONDS = 300.0
"""Devices get so long to score where the recipe names no deadline, or as long as the round took, if that is longer.

A device that has not trained yet loads model and data first.
"""


def score_by_clients(
    grid: Grid, shop: Workshop, run: str, crew: Crew, state: State, number: int, took: float
) -> tuple[ClientScore, ...]:
    """Figures of the shared state by each client that ``evaluation.clients`` asks for after round ``number``.

    ``took`` is how many seconds the round has taken. Devices that are away are not asked, nor waited for after the
    deadline; whoever gives no figures is told to the watcher, with the reason.
    """
    clients = draw_scorers(shop.recipe, _connected(grid, crew))
    if not clients:
        return ()
    answers = _ask(grid, shop, run, crew, clients, state, number, took)
    reasons = {f"client {one} ({crew.names[one]})": said for one, said in answers.items() if isinstance(said, str)}
    if reasons:
        tell(Unscored(number, len(clients), reasons))
    scored = [(client, said) for client, said in answers.items() if isinstance(said, OwnScore)]
    metrics = shop.recipe.evaluation.metrics
    return tuple(one for client, score in scored for one in figures_of(client, "shared", score, metrics))


def _ask(
    grid: Grid, shop: Workshop, run: str, crew: Crew, clients: Sequence[int], state: State, number: int, took: float
) -> dict[int, OwnScore | str]:
    """The score of each client, or why there is none, in client order."""
    answers: dict[int, OwnScore | str] = dict.fromkeys(clients, NO_REPLY_IN_TIME)

    def note_removed(client: int) -> None:
        answers[client] = DEVICE_REMOVED

    with spooling(run, number) as spool:
        parts = Parts(shop, state, number, spool if crew.shares_disk else None)
        messages = make_messages(shop, run, crew, clients, parts, scoring=True)
        for client, reply in replies(grid, messages, _deadline(shop.recipe, crew, took), crew.poll, note_removed):
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
    ranked = np.random.default_rng(derive(recipe.seed, "scorers")).permutation(recipe.clients).tolist()
    there = set(among)
    return sorted([client for client in ranked if client in there][:wanted])


def _connected(grid: Grid, crew: Crew) -> list[int]:
    """The clients that may be asked, without devices that are away."""
    if not crew.deployed:
        return list(crew.eligible)
    there = set(grid.get_node_ids())
    return [client for client in crew.eligible if crew.nodes[client] in there]


def _deadline(recipe: Recipe, crew: Crew, took: float) -> float | None:
    """Seconds to wait; no end in a simulation: its deadlines are in simulated time, and every client answers."""
    if not crew.deployed:
        return None
    return recipe.federation.deadline or max(_LEAST_SECONDS, took)


def _read(reply: Message) -> OwnScore | str:
    """A client's score, or why there is none."""
    if reply.has_error():
        return ": ".join(read_error(reply.error))
    try:
        score = read_score(reply.content.metric_records.get("report"))
    except ContributionError as error:
        return f"refused: {clean_text(error)}"
    return score if score.predictions else f"it holds out fewer than {FEWEST} examples"
