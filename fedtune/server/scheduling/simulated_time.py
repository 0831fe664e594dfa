"""The seed decides how long a client trains in simulated time, and which clients drop out; no clock is read.

A simulation repeats bit for bit because everything that depends on time is a function of the recipe: a deadline, a
dropout and "ask 12, take the first 10" mean the same on a fast machine and on a busy one.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from fedtune.flower.exchange import stream_replies
from fedtune.recipe.schema import Recipe
from fedtune.seeds import derive_seed
from fedtune.server.scheduling.round_scheduler import (
    DROPPED_OUT,
    NO_REPLY_BEFORE_DEADLINE,
    NOT_NEEDED,
    MessageFactory,
    RoundScheduler,
)
from fedtune.server.selection import prefer_clients, sample_cohort

__all__ = ["RoundPlan", "Simulated", "drops_out", "duration", "plan_round"]


def duration(recipe: Recipe, size: int, client: int, round_number: int) -> float:
    """Return the simulated seconds that a client with ``size`` examples trains in a round.

    This is the number of examples divided by the class's ``examples_per_second`` (1 by default), times a log-normal
    random number whose logarithm has the standard deviation ``spread``.
    """
    train, device = recipe.get_round_recipe(round_number).train, recipe.get_device_class(client)
    examples = (
        train.local_steps * (device.batch_size or train.batch_size)
        if train.local_steps
        else size * (train.local_epochs or 1)
    )
    random = np.random.default_rng(derive_seed(recipe.seed, round_number, client, "duration"))
    return float(examples / (device.examples_per_second or 1.0) * np.exp(random.normal(0.0, device.spread)))


def drops_out(recipe: Recipe, client: int, round_number: int) -> bool:
    """Whether a selected client never replies: a draw of its device class's ``dropout``."""
    chance = recipe.get_device_class(client).dropout
    return bool(chance) and bool(
        np.random.default_rng(derive_seed(recipe.seed, round_number, client, "dropout")).random() < chance
    )


class RoundPlan(NamedTuple):
    """A synchronous round: seconds of the clients that reply in time, earliest first; the others with the reasons."""

    in_time: Mapping[int, float]
    absent: Mapping[int, str]


def plan_round(recipe: Recipe, clients: Sequence[int], sizes: Sequence[int], round_number: int) -> RoundPlan:
    """Return which clients reply in time; ``sizes`` are the numbers of examples of all clients of the run.

    Clients of a class without ``examples_per_second`` are never late. For ``take_first``, they train on one example per
    second.
    """
    deadline = recipe.federation.deadline
    seconds = {client: duration(recipe, sizes[client], client, round_number) for client in clients}
    absent: dict[int, str] = {}
    for client in clients:
        if drops_out(recipe, client, round_number):
            absent[client] = DROPPED_OUT
        elif (
            deadline is not None
            and recipe.get_device_class(client).examples_per_second is not None
            and seconds[client] > deadline
        ):
            absent[client] = NO_REPLY_BEFORE_DEADLINE
    there = sorted((client for client in clients if client not in absent), key=lambda one: (seconds[one], one))
    return RoundPlan({client: seconds[client] for client in there}, absent)


class Simulated(RoundScheduler):
    """Synchronous rounds in simulated time. Only clients whose update counts are trained.

    ``among`` are the eligible clients. ``count_examples`` returns the examples of every client of the run in a round;
    ``last`` returns the last round that selected each client.
    """

    def __init__(
        self,
        grid: Grid,
        recipe: Recipe,
        among: Sequence[int],
        count_examples: Callable[[int], Sequence[int]],
        poll: float,
        last: Callable[[], Mapping[int, int]],
    ) -> None:
        self._grid, self._recipe, self._among, self._count = grid, recipe, among, count_examples
        self._poll, self._last = poll, last
        self._number, self._plan = 0, RoundPlan({}, {})
        self._asked: list[int] = []
        self._enough = False
        self._preferred: Collection[int] = ()

    def prefer_clients(self, clients: Collection[int]) -> None:
        """Select these first."""
        self._preferred = clients

    def begin_round(self, round_number: int) -> int:
        """Sample the round's clients, and draw their durations and dropouts."""
        last = self._last() if self._recipe.federation.selection.sampling == "least-recent" else {}
        sampled = sample_cohort(self._recipe, round_number, self._among, last)
        clients = prefer_clients(sampled, self._among, self._preferred)
        sizes = self._count(round_number)
        self._number, self._plan = round_number, plan_round(self._recipe, clients, sizes, round_number)
        self._asked, self._enough = [], False
        return min(self._wanted, len(self._plan.in_time))

    @property
    def _wanted(self) -> int:
        return self._recipe.federation.take_first or self._recipe.num_clients

    def stream_replies(self, send: MessageFactory, usable: Callable[[], int]) -> Iterator[tuple[int, Message]]:
        """Yield the earliest replies; an update that cannot be used is replaced by the next client's."""
        queue = list(self._plan.in_time)
        while queue and usable() < self._wanted:
            missing = self._wanted - usable()
            asked, queue = queue[:missing], queue[missing:]
            self._asked += asked
            yield from stream_replies(self._grid, send(sorted(asked), self._number), None, self._poll)
        self._enough = usable() >= self._wanted

    def list_missing_clients(self, answered: Collection[int]) -> dict[int, str]:
        """Clients that dropped out, were too late, or were not needed any more."""
        unneeded = [client for client in self._plan.in_time if client not in answered]
        return {**self._plan.absent, **dict.fromkeys(unneeded, NOT_NEEDED)}

    def seconds(self) -> float | None:
        """The seconds until the last needed reply or the deadline; None if a class has no ``examples_per_second``."""
        if any(device.examples_per_second is None for device in self._recipe.devices):
            return None
        if self._plan.absent and not self._enough and self._recipe.federation.deadline is not None:
            return self._recipe.federation.deadline
        return max((self._plan.in_time[client] for client in self._asked), default=0.0)
