"""Which clients are at work since which round, and whom to ask next, where rounds do not wait for everybody.

It knows no clock: the same book is kept for real devices and for a simulation's timetable.
"""

from collections.abc import Collection, Mapping, Sequence

from fedtune.recipe.federation import Asynchronous
from fedtune.recipe.schema import Recipe
from fedtune.server.selection import count_cohort, rank_clients

__all__ = ["InFlightTracker"]


class InFlightTracker:
    """Clients ``among`` a recipe's, as many at work at a time as a round would ask.

    ``number`` is the round it has turned to. A client answers at most once in a round, and begins at most once with a
    round's state: a second time it would send the same.
    """

    def __init__(self, recipe: Recipe, among: Sequence[int], late: Asynchronous) -> None:
        self._recipe, self._among, self._late = recipe, among, late
        self._count = count_cohort(recipe, among)
        self._since: dict[int, int] = {}
        self.number = 0
        self._order: list[int] = []
        self._heard: set[int] = set()

    def admit(self, clients: Sequence[int], moved: Collection[int]) -> list[int]:
        """Ask nobody but these from now on; those whose work is lost, as they are none of these or have ``moved``."""
        self._among = clients
        lost = sorted(client for client in self._since if client in moved or client not in clients)
        for client in lost:
            del self._since[client]
        return lost

    def begin_round(self, number: int, last: Mapping[int, int]) -> list[int]:
        """Turn to round ``number``; the clients that are given up, since their answers would be too old for it."""
        self.number = number
        self._order = rank_clients(self._recipe, number, self._among, last)
        given_up = sorted(client for client, begun in self._since.items() if number - begun > self._late.max_staleness)
        self._heard = set(given_up)
        for client in given_up:
            del self._since[client]
        return given_up

    def start_next_clients(self) -> list[int]:
        """Clients to ask now, so that enough are at work; they count as working on this round from now on."""
        room = self._count - len(self._since)
        free = [client for client in self._order if client not in self._since and client not in self._heard]
        chosen = free[: max(0, room)]
        self._since |= dict.fromkeys(chosen, self.number)
        return chosen

    def get_start_round(self, client: int) -> int | None:
        """The round a client began that it is at work on."""
        return self._since.get(client)

    def finish_client(self, client: int) -> int:
        """A client at work answered, or never will; by how many rounds its answer is late."""
        self._heard.add(client)
        return self.number - self._since.pop(client)
