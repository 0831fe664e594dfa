"""Devices that are removed while a run goes on, and enrolled again: places, rounds and sentences."""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from flwr.app import Message
from flwr.serverapp import Grid

from fedtune.recipe.schema import Recipe
from fedtune.server.client_device import ClientDevice
from fedtune.server.roster import Roster
from fedtune.server.run_clients import RunClients, wait_for_clients
from fedtune.server.scheduling.asynchronous import AsynchronousScheduler
from fedtune.server.scheduling.in_flight import InFlightTracker
from fedtune.server.scheduling.round_scheduler import RoundScheduler, SynchronousScheduler
from fedtune.tracking import Assignment, Store
from tests.federations import trivial


@pytest.fixture
def store(home: Path) -> Iterator[Store]:
    with Store.open() as opened:
        opened.create_run(id="run", name="run", recipe="{}", seed=0, engine="devices", rounds_planned=2)
        for client in range(4):
            enrol(opened, client, 10 + client)
        opened.access.assign_clients(
            "run", [Assignment(client=one, device_name=f"dev-{one}", node_id=str(10 + one)) for one in range(4)]
        )
        yield opened


def enrol(store: Store, client: int, node: int) -> None:
    store.access.add_device(name=f"dev-{client}", node_id=str(node), public_key=f"pem {node}")


class Listening(RoundScheduler):
    """Hears who may be asked."""

    def __init__(self) -> None:
        self.heard: list[tuple[list[int], set[int]]] = []

    def admit(self, clients: Sequence[int], moved: Collection[int]) -> None:
        self.heard.append((list(clients), set(moved)))

    def begin_round(self, number: int) -> int:
        return 0

    def stream_replies(self, send: Any, usable: Any) -> Iterator[tuple[int, Message]]:
        return iter(())

    def list_missing_clients(self, answered: Collection[int]) -> dict[int, str]:
        return {}


class Nodes:
    """A grid with some nodes, which takes messages for them only."""

    def __init__(self, *nodes: int) -> None:
        self.nodes = nodes

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Any) -> list[str | None]:
        return [f"to {message}" if message in self.nodes else None for message in messages]

    def pull_messages(self, _: Any) -> list[Message]:
        return []


CONNECTED = Nodes(10, 11, 12, 13, 55, 77)


def roster(store: Store, quorum: int = 2) -> Roster:
    return Roster(store, "run", trivial(f"federation.quorum={quorum}"), cast("Grid", CONNECTED))


def test_a_device_enrolled_again_under_its_name_has_its_place_again(store: Store) -> None:
    store.access.remove_device("dev-2")
    enrol(store, 2, 99)
    assert [(seat.device_name, seat.node_id) for seat in store.access.list_assignments("run")] == [
        ("dev-0", "10"),
        ("dev-1", "11"),
        ("dev-2", "99"),
        ("dev-3", "13"),
    ]


def test_a_run_goes_on_with_those_that_are_left_and_knows_who_moved(store: Store) -> None:
    crew, asking = RunClients([10, 11, 12, 13], [ClientDevice("toy", f"dev-{one}") for one in range(4)]), Listening()
    made = roster(store)
    store.access.remove_device("dev-1")
    assert made.list_removed_clients() == [1]
    crew = made.refresh_devices(crew, asking)
    enrol(store, 1, 77)
    crew = made.refresh_devices(crew, asking)
    assert made.list_removed_clients() == []
    assert asking.heard == [([0, 2, 3], set()), ([0, 1, 2, 3], {1})]
    assert list(crew.node_ids) == [10, 77, 12, 13]
    assert store.run("run").reason == "", "nothing had to be waited for"


def test_a_run_whose_quorum_is_gone_waits_says_what_to_do_and_goes_on(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def sleep(_: float) -> None:
        said.append(store.run("run").reason)
        if len(said) == 3:
            enrol(store, 3, 55)

    monkeypatch.setattr(time, "sleep", sleep)
    for client in (1, 3):
        store.access.remove_device(f"dev-{client}")
    there = roster(store, quorum=3).wait()
    assert [seat.client for seat in there] == [0, 2, 3]
    assert set(said) == {
        "waits: dev-1, dev-3 were removed, and too few devices are left for federation.quorum 3; enrol again under the "
        "same name (fedtune server create-token dev-1), or stop the run and submit it with a lower quorum"
    }
    assert store.list_unfinished_runs("devices")[0].reason == ""


def test_a_run_whose_devices_are_away_waits_and_spends_no_round(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    grid = Nodes(10)

    def sleep(_: float) -> None:
        said.append(store.list_unfinished_runs("devices")[0].reason)
        grid.nodes = (10, 12) if len(said) < 3 else (10, 12, 13)

    monkeypatch.setattr(time, "sleep", sleep)
    made = Roster(store, "run", trivial("federation.quorum=3"), cast("Grid", grid))
    assert [seat.client for seat in made.wait()] == [0, 1, 2, 3], "whoever is away may still come"
    assert said == [
        "waits for devices: dev-1, dev-2, dev-3 are away, and federation.quorum is 3",
        "waits for devices: dev-1, dev-3 are away, and federation.quorum is 3",
        "waits for devices: dev-1, dev-3 are away, and federation.quorum is 3",
    ]
    assert store.list_unfinished_runs("devices")[0].reason == ""


def test_a_removed_device_is_not_waited_for_when_a_run_is_taken_up_again(store: Store) -> None:
    seats = store.access.list_assignments("run")
    crew = wait_for_clients(cast("Grid", Nodes(10, 11, 13)), trivial("federation.quorum=2"), seats, 60.0, lambda: [2])
    assert list(crew.node_ids) == [10, 11, 12, 13], "clients keep their numbers"


def test_a_device_that_is_removed_meanwhile_is_not_called_late() -> None:
    crew = RunClients([1, 2, 3], [ClientDevice(name) for name in "abc"], removed=lambda: [2])
    assert crew.explain_missing_clients({1: "late", 2: "late"}) == {
        1: "late",
        2: "its device was removed from the server",
    }


def test_rounds_ask_as_many_as_before_as_far_as_there_are_as_many() -> None:
    recipe = trivial("devices=[{name: toy, count: 10}]", "federation.fraction_train=0.5", "federation.quorum=3")
    asking = SynchronousScheduler(cast("Grid", Nodes()), recipe, range(10), 0.0, dict)
    assert asking.begin_round(1) == 5
    asking.admit([0, 1, 2, 3, 4, 5], set())
    for number in range(2, 12):
        assert asking.begin_round(number) == 5
        assert set(asking.list_missing_clients(())) <= {0, 1, 2, 3, 4, 5}
    asking.admit([0, 7, 9], set())
    assert asking.begin_round(12) == 3
    assert set(asking.list_missing_clients(())) == {0, 7, 9}


LATE = "federation.asynchronous={buffer: 2, oldest: 5}"


def buffered(recipe: Recipe, grid: Nodes) -> AsynchronousScheduler:
    late = recipe.federation.asynchronous
    assert late is not None
    return AsynchronousScheduler(cast("Grid", grid), InFlightTracker(recipe, range(4), late), 2, 0.05, 0.0, dict)


def test_work_of_a_removed_device_is_not_waited_for_and_its_successor_is_asked_anew() -> None:
    grid = Nodes(10, 11, 12, 13)
    asking, asked = buffered(trivial(LATE), grid), list[list[int]]()
    nodes = {0: 10, 1: 11, 2: 12, 3: 13}

    def send(clients: Sequence[int], _: int) -> Mapping[int, Message]:
        asked.append(sorted(clients))
        return cast("Mapping[int, Message]", {client: nodes[client] for client in clients})

    asking.begin_round(1)
    assert list(asking.stream_replies(send, lambda: 0)) == []
    asking.admit([0, 2, 3], set())
    asking.begin_round(2)
    assert list(asking.list_missing_clients(())) == [1], "its answer will never come"
    list(asking.stream_replies(send, lambda: 0))
    nodes[1] = 99
    grid.nodes = (10, 12, 13, 99)
    asking.admit([0, 1, 2, 3], {1})
    asking.begin_round(3)
    assert list(asking.list_missing_clients(())) == []
    list(asking.stream_replies(send, lambda: 0))
    assert asked == [[0, 1, 2, 3], [1]]
