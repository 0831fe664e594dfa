"""The asynchronous scheduler ends a round when its buffer of updates is full; clients in training continue.

Only this process knows which clients are in flight. After a crash they start again from the last committed round. The
order of arrival is real, so two such runs do not end with the same bits.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from fedtune.server.scheduling.in_flight import InFlightTracker
from fedtune.server.scheduling.round_scheduler import (
    DEVICE_REMOVED,
    NO_REPLY_WITHIN_MAX_STALENESS,
    MessageFactory,
    RoundScheduler,
)

__all__ = ["AsynchronousScheduler"]


class AsynchronousScheduler(RoundScheduler):
    """A round ends with ``buffer`` usable updates, when no client is left to select, or after ``deadline`` seconds."""

    def __init__(
        self,
        grid: Grid,
        tracker: InFlightTracker,
        buffer: int,
        deadline: float | None,
        poll: float,
        last: Callable[[], Mapping[int, int]],
    ) -> None:
        self._grid, self._tracker, self._buffer, self._poll, self._last = grid, tracker, buffer, poll, last
        self._deadline = float("inf") if deadline is None else deadline
        self._sent: dict[str, int] = {}
        self._arrived: deque[tuple[int, Message]] = deque()
        self._staleness: dict[int, int] = {}
        self._lost: dict[int, str] = {}
        self._moved: list[int] = []

    def admit(self, clients: Sequence[int], moved: Collection[int]) -> None:
        """Select among these; do not wait for clients whose device was removed or replaced."""
        self._moved = self._tracker.admit(clients, moved)

    def begin_round(self, round_number: int) -> int:
        """Give up on clients that are too far behind."""
        given_up, moved = self._tracker.begin_round(round_number, self._last()), self._moved
        self._staleness, self._lost, self._moved = (
            {},
            dict.fromkeys([*given_up, *moved], NO_REPLY_WITHIN_MAX_STALENESS),
            [],
        )
        self._sent = {message: client for message, client in self._sent.items() if client not in self._lost}
        self._arrived = deque(answer for answer in self._arrived if answer[0] not in self._lost)
        return self._buffer

    def stream_replies(self, send: MessageFactory, usable: Callable[[], int]) -> Iterator[tuple[int, Message]]:
        """Yield replies as they arrive, also to requests of earlier rounds; start free clients meanwhile."""
        end = time.monotonic() + self._deadline
        while usable() < self._buffer and time.monotonic() < end:
            self._ask(send)
            if not self._arrived and not self._sent:
                return
            if not self._arrived and not self._pull():
                time.sleep(self._poll)
            if self._arrived:
                client, reply = self._arrived.popleft()
                self._staleness[client] = self._tracker.finish_client(client)
                yield client, reply

    def _ask(self, send: MessageFactory) -> None:
        clients = self._tracker.start_next_clients()
        if not clients:
            return
        messages = send(clients, self._tracker.round_number)
        for client, message in zip(messages, self._grid.push_messages(messages.values()), strict=True):
            if not message:
                self._tracker.finish_client(client)
                self._lost[client] = DEVICE_REMOVED
            else:
                self._sent[message] = client

    def _pull(self) -> bool:
        """Whether a reply arrived; of several that arrive together some may be left for the next round."""
        found = self._grid.pull_messages(list(self._sent))
        for reply in found:
            if (client := self._sent.pop(reply.metadata.reply_to_message_id, None)) is not None:
                self._arrived.append((client, reply))
        return bool(self._arrived)

    def list_missing_clients(self, answered: Collection[int]) -> dict[int, str]:
        """Clients that were given up or whose device was removed; those still in training are not missing."""
        return {client: reason for client, reason in self._lost.items() if client not in answered}

    def get_staleness(self, client: int) -> int | None:
        """Rounds since the state from which the update was trained."""
        return self._staleness[client]
