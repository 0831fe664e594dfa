"""The asynchronous mode in a simulation: who would answer when is drawn first, then trained round by round.

The order of arrival is a function of the seed, the clients' examples and the speeds of their device classes, so that a
run repeats bit for bit, whatever the machine does, and a resumed run too: late answers begin with checkpoints on disk.
"""

import heapq
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from fedtune.federation import Late
from fedtune.recipe import Recipe
from fedtune.seeds import derive
from server.asking import NO_REPLY_IN_ROUNDS, NO_REPLY_IN_TIME, Asking, Send
from server.desk import Desk
from server.exchange import replies

__all__ = ["ByTimetable", "Planned", "duration", "timetable"]

_SPREAD = 0.25
"""Standard deviation of the logarithm of a duration: the same phone is not always as quick."""


class Planned(NamedTuple):
    """One round: the round each of its clients began, clients that are given up, and when it ends in seconds."""

    begun: Mapping[int, int]
    given_up: Sequence[int]
    ends: float


def duration(recipe: Recipe, size: int, client: int, number: int) -> float:
    """Simulated seconds a client with ``size`` examples trains for round ``number``: examples over speed, with luck."""
    train, device = recipe.train, recipe.device_of(client)
    examples = train.steps * (device.batch or train.batch) if train.steps else size * (train.epochs or 1)
    random = np.random.default_rng(derive(recipe.seed, number, client, "duration"))
    return float(examples / device.speed * np.exp(random.normal(0.0, _SPREAD)))


def timetable(recipe: Recipe, among: Sequence[int], sizes: Sequence[int], late: Late) -> list[Planned]:
    """All rounds of a run whose clients hold ``sizes`` examples; none of them fails, which only training can tell."""
    desk, working, now = Desk(recipe, among, late), list[tuple[float, int, int]](), 0.0
    planned: list[Planned] = []
    last: dict[int, int] = {}
    for number in range(1, recipe.federation.rounds + 1):
        given_up, begun = desk.begin(number, last), dict[int, int]()
        while len(begun) < late.buffer:
            for client in desk.next():
                heapq.heappush(working, (now + duration(recipe, sizes[client], client, number), client, number))
            if not working:
                break
            ended, client, since = heapq.heappop(working)
            if desk.begun(client) == since:  # and has not been given up
                now, begun[client] = ended, since
                desk.done(client)
        planned.append(Planned(begun, given_up, now))
        last |= dict.fromkeys([*begun, *given_up], number)
    return planned


class ByTimetable(Asking):
    """Asks at once all whose answers a round merges, each to begin with the state it would have had."""

    def __init__(self, grid: Grid, planned: Sequence[Planned], deadline: float | None, poll: float) -> None:
        self._grid, self._rounds, self._deadline, self._poll = grid, planned, deadline, poll
        self._number = 0

    def begin(self, number: int) -> int:
        """Look the round up."""
        self._number = number
        return len(self._now.begun)

    @property
    def _now(self) -> Planned:
        return self._rounds[self._number - 1]

    def replies(self, send: Send, usable: Callable[[], int]) -> Iterator[tuple[int, Message]]:
        """Whatever comes before the deadline, which is in real seconds."""
        by_round = sorted(self._now.begun, key=lambda client: (self._now.begun[client], client))
        messages: dict[int, Message] = {}
        for number, clients in groupby(by_round, self._now.begun.__getitem__):
            messages |= send(list(clients), number)
        return replies(self._grid, messages, self._deadline, self._poll)

    def silent(self, answered: Collection[int]) -> dict[int, str]:
        """Clients that should have answered, and those that are too far behind."""
        absent = [client for client in self._now.begun if client not in answered]
        return dict.fromkeys(absent, NO_REPLY_IN_TIME) | dict.fromkeys(self._now.given_up, NO_REPLY_IN_ROUNDS)

    def staleness(self, client: int) -> int | None:
        """Rounds since the state the answer began with."""
        return self._number - self._now.begun[client]
