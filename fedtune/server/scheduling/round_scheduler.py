"""Who is asked in a round, and when its answers are in."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from fedtune.flower.exchange import stream_replies
from fedtune.recipe.schema import Recipe
from fedtune.server.selection import count_cohort, sample_cohort

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
"""Makes the messages by which clients, given by number, train round so-and-so from the state that round begins with.

A client that is asked for the same round again, before its answer is recorded, is sent that state whole.
"""


class RoundScheduler(ABC):
    """One round after the other: ``begin``, then ``stream_replies`` to their end, then ``silent``."""

    def admit(self, clients: Sequence[int], moved: Collection[int]) -> None:
        """Ask nobody but these clients from now on; what ``moved`` ones were asked is lost. Called between rounds."""
        return

    @abstractmethod
    def begin_round(self, number: int) -> int:
        """Settle whom round ``number`` asks; how many answers it hopes for."""

    @abstractmethod
    def stream_replies(self, send: MessageFactory, usable: Callable[[], int]) -> Iterator[tuple[int, Message]]:
        """(client, reply) as they arrive, each client once at most; ``usable`` counts the sound ones so far."""

    @abstractmethod
    def list_missing_clients(self, answered: Collection[int]) -> dict[int, str]:
        """The clients that count as missing, given those that answered, and why."""

    def get_staleness(self, client: int) -> int | None:
        """How many rounds before this one an answer was begun; None where no answer can be late."""
        return None

    def seconds(self) -> float | None:
        """How long the round took in simulated time; None on real devices, and where no speeds are known."""
        return None


class SynchronousScheduler(RoundScheduler):
    """Real devices that all begin with the round; who is not done by the deadline is missing.

    With ``federation.take_first`` the round ends with so many usable answers.

    ``among`` are the clients that may be asked; ``last`` gives the last round each was asked in.
    """

    def __init__(
        self, grid: Grid, recipe: Recipe, among: Sequence[int], poll: float, last: Callable[[], Mapping[int, int]]
    ) -> None:
        self._grid, self._recipe, self._among, self._poll, self._last = grid, recipe, among, poll, last
        self._count = count_cohort(recipe, among)
        self._number, self._enough = 0, False
        self._clients: list[int] = []
        self._removed: set[int] = set()

    def admit(self, clients: Sequence[int], moved: Collection[int]) -> None:
        """Sample among these; as many as before, as far as there are as many."""
        self._among = clients

    def begin_round(self, number: int) -> int:
        """Sample the round's clients."""
        last = self._last() if self._recipe.federation.selection.sampling == "least-recent" else {}
        self._removed = set()
        count = min(self._count, len(self._among))
        self._number, self._clients = number, sample_cohort(self._recipe, number, self._among, last, count)
        return len(self._clients)

    def stream_replies(self, send: MessageFactory, usable: Callable[[], int]) -> Iterator[tuple[int, Message]]:
        """Whatever comes before the deadline, until there are enough."""
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
        """Every client that was asked and did not answer."""
        reason = NOT_NEEDED if self._enough else NO_REPLY_BEFORE_DEADLINE
        asked = [client for client in self._clients if client not in answered]
        return {client: DEVICE_REMOVED if client in self._removed else reason for client in asked}
