"""The manager's patience and a crew's: what waits, what goes on, what is given up."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from flwr.serverapp import Grid

from fedtune.errors import RunError, StoreError
from fedtune.flower.control_client import ControlClient, FlowerRunStatus
from fedtune.flower.superlink import SuperLink
from fedtune.server import run_clients, run_manager
from fedtune.server.client_device import ClientDevice
from fedtune.server.presence import Presence
from fedtune.server.run_clients import wait_for_clients
from fedtune.server.run_manager import RunManager
from fedtune.tracking import Assignment, Store
from tests.federations import trivial


class Hopeless:
    """A SuperLink whose runs end at once: the one part of the manager's work that a real one does too slowly."""

    start_count = 1

    def __init__(self) -> None:
        self.started = 0

    def is_superexec_alive(self) -> bool:
        return True

    def get_control_client(self) -> ControlClient:
        return cast("ControlClient", self)

    def list_online_nodes(self) -> set[int]:
        return {1, 2, 3, 4}

    def start_run(self, _: dict[str, str]) -> int:
        self.started += 1
        return self.started

    def get_run_status(self, _: int) -> FlowerRunStatus:
        return FlowerRunStatus("finished", "failed", "it fell over")

    def stop_run(self, _: int) -> None:
        """It has ended."""


@pytest.fixture
def store(home: Path) -> Iterator[Store]:
    with Store.open() as opened:
        yield opened


def managed(store: Store, superlink: Any, home: Path) -> RunManager:
    presence = Presence(superlink.list_online_nodes, lambda: 0.0)
    for number in range(10):
        presence.record_contact(f"dev-{number}")
    return RunManager(store, cast("SuperLink", superlink), presence, home, deadline=77.0)


def enrol(store: Store, *nodes: int) -> None:
    for node in nodes:
        store.access.add_device(name=f"dev-{9 - node}", node_id=str(node), public_key=f"pem {node}")


def test_a_run_waits_until_enough_devices_are_connected_and_seats_them_by_name(store: Store, home: Path) -> None:
    work = managed(store, Hopeless(), home)
    run = work.submit_run(trivial())
    enrol(store, 1, 2, 3)
    work.tick()
    assert store.run(run).reason == "waits for devices: 3 of 4 are connected"
    assert store.access.list_assignments(run) == []
    enrol(store, 4, 5)
    work.tick()
    assert [(seat.client, seat.device_name, seat.node_id) for seat in store.access.list_assignments(run)] == [
        (0, "dev-5", "4"),
        (1, "dev-6", "3"),
        (2, "dev-7", "2"),
        (3, "dev-8", "1"),
    ]


def test_a_device_that_connects_meanwhile_lets_no_newer_run_overtake(store: Store, home: Path) -> None:
    class Filling(Hopeless):
        """One more device is there each time that one looks."""

        looks = 2

        def list_online_nodes(self) -> set[int]:
            self.looks += 1
            return set(range(1, self.looks + 1))

    work = managed(store, Filling(), home)
    older, newer = work.submit_run(trivial()), work.submit_run(trivial())
    enrol(store, 1, 2, 3, 4, 5)
    work.tick()
    assert {store.run(run).reason for run in (older, newer)} == {"waits for devices: 3 of 4 are connected"}
    work.tick()
    assert store.access.list_assignments(older)
    assert not store.access.list_assignments(newer)


def test_every_submitted_run_has_a_deadline(store: Store, home: Path) -> None:
    work = managed(store, Hopeless(), home)
    assert '"deadline":77.0' in store.run(work.submit_run(trivial())).recipe
    assert '"deadline":5.0' in store.run(work.submit_run(trivial("federation.deadline=5"))).recipe


def test_a_run_that_dies_at_every_start_is_failed_in_the_end(
    store: Store, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_manager, "_LONGEST_REST", 0.0)
    superlink = Hopeless()
    work = managed(store, superlink, home)
    run = work.submit_run(trivial())
    enrol(store, 1, 2, 3, 4)
    for _ in range(100):
        work.tick()
    found = store.run(run)
    assert (found.status, found.reason) == ("failed", "it fell over; 8 starts completed no round")
    assert superlink.started == 8


def test_a_store_that_cannot_be_written_for_a_while_counts_no_starts(
    store: Store, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: str) -> None:
        raise StoreError("the disk is full")

    superlink = Hopeless()
    work = managed(store, superlink, home)
    run = work.submit_run(trivial())
    enrol(store, 1, 2, 3, 4)
    work.tick()
    with monkeypatch.context() as patched:
        patched.setattr(store, "set_run_reason", full)
        for _ in range(100):
            with pytest.raises(StoreError):
                work.tick()
    work.tick()
    assert superlink.started == 1
    assert store.run(run).reason == "it fell over; continues at round 1"
    assert work.get_recorded_run(store.run(run)).status == "running"


def test_a_run_that_died_rests_before_it_is_started_again(store: Store, home: Path) -> None:
    superlink = Hopeless()
    work = managed(store, superlink, home)
    run = work.submit_run(trivial())
    enrol(store, 1, 2, 3, 4)
    for _ in range(100):
        work.tick()
    assert superlink.started < 4
    assert work.get_recorded_run(store.run(run)).status == "running"
    assert store.run(run).reason == "it fell over; continues at round 1"


def test_a_simulation_is_not_the_managers(store: Store, home: Path) -> None:
    store.create_run(id="mine", name="mine", recipe="{}", seed=0, engine="in-process", rounds_planned=1)
    with pytest.raises(StoreError, match="is a simulation of this machine"):
        managed(store, Hopeless(), home).stop_run("mine")


class Connected:
    """A grid with some nodes."""

    def __init__(self, *nodes: int) -> None:
        self._nodes = nodes

    def get_node_ids(self) -> list[int]:
        return list(self._nodes)


SEATS = [Assignment(client=client, device_name=f"dev-{client}", node_id=str(10 - client)) for client in range(4)]


def test_a_crew_is_in_the_order_of_its_seats_whoever_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_clients, "_PATIENCE_FOR_ALL", 0.1)
    found = wait_for_clients(cast("Grid", Connected(7, 8, 99)), trivial("federation.quorum=2"), SEATS)
    assert found.node_ids == [10, 9, 8, 7]
    assert found.devices == [ClientDevice("toy", f"dev-{client}") for client in range(4)]


def test_too_few_devices_for_a_round_are_told() -> None:
    with pytest.raises(RunError, match="only 1 of 2 devices connected"):
        wait_for_clients(cast("Grid", Connected(7, 99)), trivial("federation.quorum=2"), SEATS, patience=0.1)


class Bereft(Hopeless):
    """A SuperLink whose runs stay pending; the process that would start them can be killed."""

    def __init__(self) -> None:
        super().__init__()
        self.whole, self.ended = True, 0

    def is_superexec_alive(self) -> bool:
        return self.whole

    def stop(self) -> None:
        self.ended += 1

    def get_run_status(self, _: int) -> FlowerRunStatus:
        return FlowerRunStatus("pending", "", "")


def test_a_superlink_that_cannot_start_runs_is_ended_before_it_is_given_one(store: Store, home: Path) -> None:
    superlink = Bereft()
    work = managed(store, superlink, home)
    work.submit_run(trivial())
    enrol(store, 1, 2, 3, 4)
    superlink.whole = False
    work.tick()
    assert (superlink.ended, superlink.started) == (1, 0)
    superlink.whole = True
    work.tick()
    assert (superlink.ended, superlink.started) == (1, 1)


def test_a_pending_run_is_not_waited_for_when_nobody_will_start_it(store: Store, home: Path) -> None:
    superlink = Bereft()
    work = managed(store, superlink, home)
    run = work.submit_run(trivial())
    enrol(store, 1, 2, 3, 4)
    work.tick()
    work.tick()
    assert (superlink.ended, superlink.started) == (0, 1), "it may still be starting"
    superlink.whole = False
    work.tick()
    assert superlink.ended == 1
    assert store.run(run).reason == "the SuperLink did not start the run; continues at round 1"


class Working(Hopeless):
    """A SuperLink whose runs work until they are let fall."""

    def __init__(self) -> None:
        super().__init__()
        self.works, self.stopped = True, 0

    def get_run_status(self, _: int) -> FlowerRunStatus:
        return (
            FlowerRunStatus("running", "", "") if self.works else FlowerRunStatus("finished", "failed", "it fell over")
        )

    def stop_run(self, _: int) -> None:
        self.stopped += 1


def test_a_run_that_is_stopped_and_resumed_between_two_ticks_goes_on_and_may_fail_later(
    store: Store, home: Path
) -> None:
    superlink = Working()
    work = managed(store, superlink, home)
    run = work.submit_run(trivial())
    enrol(store, 1, 2, 3, 4)
    work.tick()
    work.stop_run(run)
    work.resume_run(run)
    work.tick()
    assert store.list_unfinished_runs("devices")[0].status == "running"
    assert (superlink.started, superlink.stopped) == (1, 0), "its process goes on"
    superlink.works = False
    for _ in range(3):
        work.tick()
    assert store.run(run).reason == "it fell over; continues at round 1"


def test_a_run_that_is_stopped_and_resumed_while_its_process_dies_is_started_again(store: Store, home: Path) -> None:
    superlink = Working()
    work = managed(store, superlink, home)
    run = work.submit_run(trivial())
    enrol(store, 1, 2, 3, 4)
    work.tick()
    work.stop_run(run)
    work.resume_run(run)
    superlink.works = False
    work.tick()
    superlink.works = True
    assert store.run(run).reason == "it fell over; continues at round 1"
    work._trouble[run].rest_until = 0.0
    work.tick()
    work.tick()
    assert superlink.started == 2


def test_a_run_that_is_resumed_does_not_wait_for_the_rest_of_its_last_failure(store: Store, home: Path) -> None:
    superlink = Hopeless()
    work = managed(store, superlink, home)
    run = work.submit_run(trivial())
    enrol(store, 1, 2, 3, 4)
    work.tick()
    work.tick()
    assert superlink.started == 1
    work.stop_run(run)
    work.resume_run(run)
    work.tick()
    assert superlink.started == 2


def test_a_run_is_rolled_back_only_once_it_is_stopped(store: Store, home: Path) -> None:
    work = managed(store, Hopeless(), home)
    run = work.submit_run(trivial())
    with pytest.raises(StoreError, match="is queued; stop it first: fedtune runs stop"):
        work.rollback(run, 0)
    work.stop_run(run)
    with pytest.raises(StoreError, match="has not recorded a checkpoint of round 0"):
        work.rollback(run, 0)


def test_a_quarantined_device_gets_no_place_in_a_new_run(store: Store, home: Path) -> None:
    work = managed(store, Hopeless(), home)
    run = work.submit_run(trivial())
    enrol(store, 1, 2, 3, 4)
    store.access.quarantine_device("dev-8", "3 refused in a row")
    work.tick()
    assert store.run(run).reason == "waits for devices: 3 of 4 are connected"
    store.access.release_device("dev-8")
    work.tick()
    assert len(store.access.list_assignments(run)) == 4
