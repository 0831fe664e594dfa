"""Devices whose answers take as long as the test says, on a clock that moves only when somebody waits."""

from collections.abc import Callable, Iterable, Sequence

from flwr.app import Error, Message
from flwr.clientapp import ClientApp

from fedtune.flower.message_identity import set_message_id
from fedtune.simulation.in_process_grid import InProcessGrid
from fedtune.simulation.workers import SequentialWorkers
from fedtune.tracking import Assignment, Store
from tests.federations import order_of

__all__ = ["NEVER", "TickingGrid", "seat"]

NEVER = float("inf")


class TickingGrid(InProcessGrid):
    """``takes(client, round)`` says how long an order takes; clients in ``gone`` cannot be sent anything."""

    def __init__(
        self, nodes: int, app: ClientApp, takes: Callable[[int, int], float], gone: Sequence[int] = ()
    ) -> None:
        super().__init__(nodes, SequentialWorkers(app))
        self._app, self._takes, self._gone = app, takes, gone
        self._due: dict[str, tuple[float, int, Message]] = {}
        self._now = 0.0

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Orders beside those that are under way; as on a SuperLink, no number where there is no such device."""
        return [self._take(message) for message in messages]  # type: ignore[misc]  # Flower's own gives None too

    def _take(self, message: Message) -> str | None:
        begun, client = order_of(message)
        if client in self._gone:
            return None
        number = set_message_id(message, str(next(self._numbers)))
        self._due[number] = (self._now + self._takes(client, begun), client, self._answer(message))
        return number

    def _answer(self, message: Message) -> Message:
        try:
            return self._app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:
            return Message(Error(code=2, reason=repr(error)), reply_to=message)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """What is due next among those asked for, all of the same moment, by client."""
        asked = [(*self._due[number][:2], number) for number in message_ids]
        first = min((due for due, _, _ in asked), default=NEVER)
        if first == NEVER:
            return []
        self._now = max(self._now, first)
        return [self._due.pop(number)[2] for due, _, number in sorted(asked) if due <= self._now]


def seat(store: Store, run: str, clients: int) -> None:
    """Each node of the grid is an enrolled device of the run."""
    known = {device.name for device in store.access.list_devices()}
    for i in (i for i in range(clients) if f"dev-{i}" not in known):
        store.access.add_device(name=f"dev-{i}", node_id=str(i + 2), public_key=f"key-{i}")
    store.access.assign_clients(
        run, [Assignment(client=i, device_name=f"dev-{i}", node_id=str(i + 2)) for i in range(clients)]
    )
