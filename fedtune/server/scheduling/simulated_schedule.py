"""Asynchronous rounds in a simulation: the times of all replies are drawn first, then clients train round by round.

The order of replies is a function of the seed, the clients' examples and the speeds of their device classes. A run is
therefore reproducible bit for bit on any machine. A resumed run is too, because stale updates start from checkpoints.
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
    """One round: its number, the start round of each of its clients, the clients given up, its start and end."""

    round_number: int
    start_rounds: Mapping[int, int]
    dropped_clients: Sequence[int]
    begins: float
    end_seconds: float


def make_simulated_schedule(
    recipe: Recipe, among: Sequence[int], sizes: Sequence[int], asynchronous: Asynchronous
) -> Iterator[ScheduledRound]:
    """Yield the rounds of a run whose clients hold ``sizes`` examples.

    Failures are not part of the schedule, because only training shows them. A client that drops out counts as in
    training until it is given up. The deadline applies only if a device class has ``examples_per_second``.
    """
    tracker, working, now = InFlightTracker(recipe, among, asynchronous), list[tuple[float, int, int]](), 0.0
    last_selected: dict[int, int] = {}
    patience = recipe.federation.deadline if any(device.examples_per_second for device in recipe.devices) else None
    for round_number in range(1, recipe.federation.rounds + 1):
        given_up, begun, begins = tracker.begin_round(round_number, last_selected), dict[int, int](), now
        ends = begins + (patience or math.inf)
        while len(begun) < asynchronous.buffer_size:
            for client in tracker.start_next_clients():
                if not drops_out(recipe, client, round_number):
                    heapq.heappush(
                        working, (now + duration(recipe, sizes[client], client, round_number), client, round_number)
                    )
            if not working or working[0][0] > ends:
                now = now if math.isinf(ends) else ends
                break
            ended, client, since = heapq.heappop(working)
            if tracker.get_start_round(client) == since:  # and has not been given up
                now, begun[client] = ended, since
                tracker.finish_client(client)
        yield ScheduledRound(round_number, begun, given_up, begins, now)
        last_selected |= dict.fromkeys([*begun, *given_up], round_number)


class SimulatedAsynchronousScheduler(RoundScheduler):
    """A round sends requests to exactly the clients whose updates it merges, each with the state it would have had."""

    def __init__(self, grid: Grid, planned: Iterable[ScheduledRound], poll: float) -> None:
        self._grid, self._planned, self._poll = grid, iter(planned), poll
        self._now = ScheduledRound(0, {}, (), 0.0, 0.0)

    def begin_round(self, round_number: int) -> int:
        """Go to the round; a resumed run skips those that were committed."""
        self._now = next(planned for planned in self._planned if planned.round_number == round_number)
        return len(self._now.start_rounds)

    def stream_replies(self, send: MessageFactory, usable: Callable[[], int]) -> Iterator[tuple[int, Message]]:
        """Yield the replies of the round; updates after a deadline belong to a later one."""
        by_round = sorted(self._now.start_rounds, key=lambda client: (self._now.start_rounds[client], client))
        messages: dict[int, Message] = {}
        for round_number, clients in groupby(by_round, self._now.start_rounds.__getitem__):
            messages |= send(list(clients), round_number)
        return stream_replies(self._grid, messages, None, self._poll)

    def list_missing_clients(self, answered: Collection[int]) -> dict[int, str]:
        """Clients that are too far behind."""
        return dict.fromkeys(self._now.dropped_clients, NO_REPLY_WITHIN_MAX_STALENESS)

    def get_staleness(self, client: int) -> int | None:
        """Rounds since the state from which the update was trained."""
        return self._now.round_number - self._now.start_rounds[client]

    def seconds(self) -> float | None:
        """The seconds from the end of the previous round to the end of this one."""
        return self._now.end_seconds - self._now.begins
