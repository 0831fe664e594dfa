"""Who is asked in a round, and when its answers are in."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from fedtune.recipe import Recipe
from server.exchange import replies
from server.selection import sample

__all__ = ["DEVICE_REMOVED", "NO_REPLY_IN_ROUNDS", "NO_REPLY_IN_TIME", "Asking", "Send", "Together"]

NO_REPLY_IN_TIME = "no reply before the deadline"
DEVICE_REMOVED = "its device was removed from the server; enroll one under its name, or start a new run"
NO_REPLY_IN_ROUNDS = "no reply within the rounds that federation.late.oldest allows"

Send = Callable[[Sequence[int], int], Mapping[int, Message]]
"""Makes the messages by which clients, given by number, train round so-and-so from the state that round begins with."""


class Asking(ABC):
    """One round after the other: ``begin``, then ``replies`` to their end, then ``silent``."""

    @abstractmethod
    def begin(self, number: int) -> int:
        """Settle whom round ``number`` asks; how many answers it hopes for."""

    @abstractmethod
    def replies(self, send: Send, usable: Callable[[], int]) -> Iterator[tuple[int, Message]]:
        """(client, reply) as they arrive, each client once at most; ``usable`` counts the sound ones so far."""

    @abstractmethod
    def silent(self, answered: Collection[int]) -> dict[int, str]:
        """The clients that count as missing, given those that answered, and why."""

    def staleness(self, client: int) -> int | None:
        """How many rounds before this one an answer was begun; None where no answer can be late."""
        return None


class Together(Asking):
    """A round's clients all begin with it; who is not done by the deadline is missing.

    ``among`` are the clients that may be asked; ``last`` gives the last round each was asked in.
    """

    def __init__(
        self, grid: Grid, recipe: Recipe, among: Sequence[int], poll: float, last: Callable[[], Mapping[int, int]]
    ) -> None:
        self._grid, self._recipe, self._among, self._poll, self._last = grid, recipe, among, poll, last
        self._number = 0
        self._clients: list[int] = []
        self._removed: set[int] = set()

    def begin(self, number: int) -> int:
        """Sample the round's clients."""
        last = self._last() if self._recipe.federation.select.prefer == "longest-ago" else {}
        self._removed = set()
        self._number, self._clients = number, sample(self._recipe, number, self._among, last)
        return len(self._clients)

    def replies(self, send: Send, usable: Callable[[], int]) -> Iterator[tuple[int, Message]]:
        """Whatever comes before the deadline."""
        messages = send(self._clients, self._number)
        return replies(self._grid, messages, self._recipe.federation.deadline, self._poll, self._removed.add)

    def silent(self, answered: Collection[int]) -> dict[int, str]:
        """Every client that was asked and did not answer."""
        return {
            client: DEVICE_REMOVED if client in self._removed else NO_REPLY_IN_TIME
            for client in self._clients
            if client not in answered
        }
