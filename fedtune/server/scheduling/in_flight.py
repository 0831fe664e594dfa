"""The in-flight tracker records which clients are training and since which round, when rounds are asynchronous.

It reads no clock, so real devices and simulated schedules share it.
"""

from collections.abc import Collection, Mapping, Sequence

from fedtune.recipe.federation import Asynchronous
from fedtune.recipe.schema import Recipe
from fedtune.server.selection import count_cohort, rank_clients

__all__ = ["InFlightTracker"]


class InFlightTracker:
    """It keeps as many of the ``eligible`` clients in training as a synchronous round would select.

    A client replies at most once in a round and starts at most once from a round's state: the second update would be
    the same.
    """

    def __init__(self, recipe: Recipe, eligible: Sequence[int], asynchronous: Asynchronous) -> None:
        self._recipe, self._eligible, self._asynchronous = recipe, eligible, asynchronous
        self._count = count_cohort(recipe, eligible)
        self._since: dict[int, int] = {}
        self.round_number = 0
        self._order: list[int] = []
        self._heard: set[int] = set()

    def admit(self, clients: Sequence[int], moved: Collection[int]) -> list[int]:
        """Select only these from now on; return the clients in training that are none of these or have ``moved``."""
        self._eligible = clients
        lost = sorted(client for client in self._since if client in moved or client not in clients)
        for client in lost:
            del self._since[client]
        return lost

    def begin_round(self, round_number: int, last_selected: Mapping[int, int]) -> list[int]:
        """Begin a round; return the clients that are given up because their updates would be too stale."""
        self.round_number = round_number
        self._order = rank_clients(self._recipe, round_number, self._eligible, last_selected)
        given_up = sorted(
            client for client, begun in self._since.items() if round_number - begun > self._asynchronous.max_staleness
        )
        self._heard = set(given_up)
        for client in given_up:
            del self._since[client]
        return given_up

    def start_next_clients(self) -> list[int]:
        """Return clients to start now, so that enough are in training; they count as in training from now on."""
        room = self._count - len(self._since)
        free = [client for client in self._order if client not in self._since and client not in self._heard]
        chosen = free[: max(0, room)]
        self._since |= dict.fromkeys(chosen, self.round_number)
        return chosen

    def get_start_round(self, client: int) -> int | None:
        """The round from whose state a client is training."""
        return self._since.get(client)

    def finish_client(self, client: int) -> int:
        """Remove a client that has replied or never will; return the staleness of its update."""
        self._heard.add(client)
        return self.round_number - self._since.pop(client)
