"""A round scheduler decides which clients train in a round and when the round ends."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from fedtune.flower.exchange import stream_replies
from fedtune.recipe.schema import Recipe
from fedtune.server.selection import count_cohort, prefer_clients, sample_cohort

__all__ = [
    "DEVICE_REMOVED",
    "DROPPED_OUT",
    "NOT_NEEDED",
    "NO_REPLY_BEFORE_DEADLINE",
    "NO_REPLY_WITHIN_MAX_STALENESS",
    "MessageFactory",
    "RoundScheduler",
    "SynchronousScheduler",
]

NO_REPLY_BEFORE_DEADLINE = "no reply before the deadline"
DEVICE_REMOVED = "its device was removed from the server"
NO_REPLY_WITHIN_MAX_STALENESS = "no reply within the rounds that federation.asynchronous.max_staleness allows"
DROPPED_OUT = "it dropped out before it replied"
NOT_NEEDED = "the round ended with the replies that federation.take_first asks for"

MessageFactory = Callable[[Sequence[int], int], Mapping[int, Message]]
"""Makes one train message per client. The clients start from the state with which the given round began.

A client that gets a second request for the same round, before its reply is recorded, is sent the whole state.
"""


class RoundScheduler(ABC):
    """For each round call ``begin_round``, then ``stream_replies`` to its end, then ``list_missing_clients``."""

    def admit(self, clients: Sequence[int], moved: Collection[int]) -> None:
        """Select only among these clients from now on; requests to ``moved`` ones are lost. Called between rounds."""
        return

    def prefer_clients(self, clients: Collection[int]) -> None:
        """Select these clients first in the next round, as far as they are eligible. Called between rounds."""
        return

    @abstractmethod
    def begin_round(self, round_number: int) -> int:
        """Select the clients of a round; return how many updates it expects."""

    @abstractmethod
    def stream_replies(self, send: MessageFactory, usable: Callable[[], int]) -> Iterator[tuple[int, Message]]:
        """Yield (client, reply) as they arrive, each client once at most; ``usable`` counts valid updates so far."""

    @abstractmethod
    def list_missing_clients(self, answered: Collection[int]) -> dict[int, str]:
        """The clients that count as missing, with the reasons, given those that replied."""

    def get_staleness(self, client: int) -> int | None:
        """How many rounds ago a client's training started; None where no update can be stale."""
        return None

    def seconds(self) -> float | None:
        """The duration of the round in simulated time; None on real devices, and without known speeds."""
        return None


class SynchronousScheduler(RoundScheduler):
    """All clients start with the round; those without a reply at the deadline are missing.

    With ``federation.take_first`` the round ends with so many usable updates. ``among`` are the eligible clients;
    ``last`` returns the last round that selected each client.
    """

    def __init__(
        self, grid: Grid, recipe: Recipe, among: Sequence[int], poll: float, last: Callable[[], Mapping[int, int]]
    ) -> None:
        self._grid, self._recipe, self._among, self._poll, self._last = grid, recipe, among, poll, last
        self._count = count_cohort(recipe, among)
        self._number, self._enough = 0, False
        self._clients: list[int] = []
        self._removed: set[int] = set()
        self._preferred: Collection[int] = ()

    def admit(self, clients: Sequence[int], moved: Collection[int]) -> None:
        """Sample among these, as many as before if there are enough."""
        self._among = clients

    def prefer_clients(self, clients: Collection[int]) -> None:
        """Select these first."""
        self._preferred = clients

    def begin_round(self, round_number: int) -> int:
        """Sample the round's clients."""
        last = self._last() if self._recipe.federation.selection.sampling == "least-recent" else {}
        self._removed = set()
        now = self._recipe.get_round_recipe(round_number).federation
        count = min(now.clients_per_round or self._count, len(self._among))
        sampled = sample_cohort(self._recipe, round_number, self._among, last, count)
        self._number, self._clients = round_number, prefer_clients(sampled, self._among, self._preferred)
        return len(self._clients)

    def stream_replies(self, send: MessageFactory, usable: Callable[[], int]) -> Iterator[tuple[int, Message]]:
        """Yield replies until the deadline, or until there are enough."""
        federation, self._enough = self._recipe.federation, False
        messages = send(self._clients, self._number)
        found = stream_replies(
            self._grid,
            messages,
            federation.deadline,
            self._poll,
            self._removed.add,
            lambda client: send([client], self._number),
        )
        for client, reply in found:
            yield client, reply
            if federation.take_first is not None and usable() >= federation.take_first:
                self._enough = True
                return

    def list_missing_clients(self, answered: Collection[int]) -> dict[int, str]:
        """Every client that was selected and did not reply."""
        reason = NOT_NEEDED if self._enough else NO_REPLY_BEFORE_DEADLINE
        asked = [client for client in self._clients if client not in answered]
        return {client: DEVICE_REMOVED if client in self._removed else reason for client in asked}
