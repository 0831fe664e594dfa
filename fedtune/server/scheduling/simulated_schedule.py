"""The asynchronous mode in a simulation: who would answer when is drawn first, then trained round by round.

The order of arrival is a function of the seed, the clients' examples and the speeds of their device classes, so that a
run repeats bit for bit, whatever the machine does, and a resumed run too: late answers begin with checkpoints on disk.
"""

import heapq
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from flwr.app import Message
from flwr.serverapp import Grid

from fedtune.flower.exchange import stream_replies
from fedtune.recipe.federation import Asynchronous
from fedtune.recipe.schema import Recipe
from fedtune.server.scheduling.in_flight import InFlightTracker
from fedtune.server.scheduling.round_scheduler import NO_REPLY_WITHIN_MAX_STALENESS, MessageFactory, RoundScheduler
from fedtune.server.scheduling.simulated_time import drops_out, duration

__all__ = ["ScheduledRound", "SimulatedAsynchronousScheduler", "make_simulated_schedule"]


class ScheduledRound(NamedTuple):
    """One round: its number, the round each of its clients began, clients that are given up, its begin and end."""

    number: int
    start_rounds: Mapping[int, int]
    dropped_clients: Sequence[int]
    begins: float
    end_seconds: float


def make_simulated_schedule(
    recipe: Recipe, among: Sequence[int], sizes: Sequence[int], late: Asynchronous
) -> Iterator[ScheduledRound]:
    """The rounds of a run whose clients hold ``sizes`` examples, one after the other.

    None of them fails, which only training can tell. A client that drops out is at work until it is given up. The
    deadline holds where a class names its speed: without one a second means nothing.
    """
    desk, working, now = InFlightTracker(recipe, among, late), list[tuple[float, int, int]](), 0.0
    last: dict[int, int] = {}
    patience = recipe.federation.deadline if any(device.examples_per_second for device in recipe.devices) else None
    for number in range(1, recipe.federation.rounds + 1):
        given_up, begun, begins = desk.begin_round(number, last), dict[int, int](), now
        ends = begins + (patience or math.inf)
        while len(begun) < late.buffer_size:
            for client in desk.start_next_clients():
                if not drops_out(recipe, client, number):
                    heapq.heappush(working, (now + duration(recipe, sizes[client], client, number), client, number))
            if not working or working[0][0] > ends:
                now = now if math.isinf(ends) else ends
                break
            ended, client, since = heapq.heappop(working)
            if desk.get_start_round(client) == since:  # and has not been given up
                now, begun[client] = ended, since
                desk.finish_client(client)
        yield ScheduledRound(number, begun, given_up, begins, now)
        last |= dict.fromkeys([*begun, *given_up], number)


class SimulatedAsynchronousScheduler(RoundScheduler):
    """Asks at once all whose answers a round merges, each to begin with the state it would have had."""

    def __init__(self, grid: Grid, planned: Iterable[ScheduledRound], poll: float) -> None:
        self._grid, self._planned, self._poll = grid, iter(planned), poll
        self._now = ScheduledRound(0, {}, (), 0.0, 0.0)

    def begin_round(self, number: int) -> int:
        """Go on to the round; a resumed run passes over those that were committed."""
        self._now = next(planned for planned in self._planned if planned.number == number)
        return len(self._now.start_rounds)

    def stream_replies(self, send: MessageFactory, usable: Callable[[], int]) -> Iterator[tuple[int, Message]]:
        """The answers of the round; those that come after a deadline are planned for a later one."""
        by_round = sorted(self._now.start_rounds, key=lambda client: (self._now.start_rounds[client], client))
        messages: dict[int, Message] = {}
        for number, clients in groupby(by_round, self._now.start_rounds.__getitem__):
            messages |= send(list(clients), number)
        return stream_replies(self._grid, messages, None, self._poll)

    def list_missing_clients(self, answered: Collection[int]) -> dict[int, str]:
        """Clients that are too far behind."""
        return dict.fromkeys(self._now.dropped_clients, NO_REPLY_WITHIN_MAX_STALENESS)

    def get_staleness(self, client: int) -> int | None:
        """Rounds since the state the answer began with."""
        return self._now.number - self._now.start_rounds[client]

    def seconds(self) -> float | None:
        """From the end of the round before to this one's."""
        return self._now.end_seconds - self._now.begins
