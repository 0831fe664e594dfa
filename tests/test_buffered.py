"""Rounds that do not wait for everybody: who is merged how late, what is given up, what a crash costs."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message
from flwr.clientapp import ClientApp
from numpy.testing import assert_allclose
from torch import Tensor

from fedtune import checkpoint
from fedtune import paths as homes
from fedtune.device.client_app import app
from fedtune.errors import RunError
from fedtune.recipe.schema import Recipe
from fedtune.server.scheduling import simulated_schedule as timetables
from fedtune.server.scheduling.simulated_schedule import make_simulated_schedule
from fedtune.server.server_app import run_to_completion
from fedtune.simulation.in_process_grid import InProcessGrid
from fedtune.simulation.workers import SequentialWorkers
from fedtune.tracking import RoundRecord, Store
from fedtune.wire.client_update import decode_tensors
from tests.federations import begin, execute, order_of, outcome, sent_state, silent, spoilt, trivial
from tests.ticking import NEVER, TickingGrid, seat

Takes = Callable[[int, int], float]
SLOW = (1.0, 1.0, 1.0, 2.5)


def slow(client: int, number: int) -> float:
    return SLOW[client]


def late(*overrides: str) -> Recipe:
    return trivial("federation.asynchronous={buffer: 3}", "federation.rounds=5", "train.local_steps=1", *overrides)


def deployed(
    recipe: Recipe, takes: Takes = slow, client: ClientApp = app, gone: Sequence[int] = (), run: str = "run-1"
) -> list[RoundRecord]:
    with Store.open() as store, silent():
        seat(store, begin(store, recipe, run), recipe.num_clients)
        run_to_completion(TickingGrid(recipe.num_clients, client, takes, gone), store, run)
    return outcome(run).rounds


def merged(rounds: Sequence[RoundRecord]) -> list[dict[int, int | None]]:
    """By round, the staleness of each merged client."""
    return [{c.client: c.staleness for c in r.client_records if c.status == "merged"} for r in rounds[1:]]


def test_a_slow_device_is_merged_when_it_comes_and_its_lateness_is_recorded(home: Path) -> None:
    first, second, third, fourth, _ = merged(deployed(late()))
    assert first == second == {0: 0, 1: 0, 2: 0}
    assert third == {0: 0, 1: 0, 3: 2}  # 0, 1 and 2 are done at the same moment, and the buffer holds three
    assert fourth == {0: 0, 1: 0, 2: 1}


def state(rounds: Sequence[RoundRecord], number: int) -> dict[str, Tensor]:
    saved = rounds[number].checkpoint
    assert saved is not None
    return checkpoint.read_checkpoint(homes.get_runs_folder() / saved.path, saved.sha256)


@pytest.mark.parametrize("way", ["deployed", "simulated"])
def test_a_late_delta_to_its_own_start_is_scaled_and_added(
    home: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    sent: dict[tuple[int, int], dict[str, Tensor]] = {}
    began: dict[tuple[int, int], dict[str, Tensor]] = {}

    def keep(message: Message, reply: Message) -> Message:
        began[order_of(message)] = decode_tensors(sent_state(message))
        sent[order_of(message)] = decode_tensors(bytes(reply.content.array_records["delta"]["safetensors"].data))
        return reply

    recipe, client = late("federation.asynchronous.staleness_exponent=0.7"), spoilt(keep, range(4))
    if way == "deployed":
        rounds = deployed(recipe, client=client)
    else:
        monkeypatch.setattr(timetables, "duration", lambda recipe, size, client, number: SLOW[client])
        rounds = execute(recipe, client).rounds
    assert max(tau for taus in merged(rounds) for tau in taus.values() if tau is not None) == 2
    for number in range(1, 6):
        before, after = state(rounds, number - 1), state(rounds, number)
        used = [one for one in rounds[number].client_records if one.status == "merged"]
        total = sum(one.num_examples for one in used)
        for name, tensor in before.items():
            expected = tensor.double().numpy()
            for one in used:
                assert one.staleness is not None
                start = (number - one.staleness, one.client)
                assert bool((began[start][name] == state(rounds, start[0] - 1)[name]).all())
                share = one.num_examples / total * (1 + one.staleness) ** -0.7
                expected = expected + share * sent[start][name].double().numpy()
            assert_allclose(after[name].numpy(), np.asarray(expected), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("oldest", [0, 1, 3])
def test_a_simulation_draws_what_devices_of_these_durations_do(
    home: Path, monkeypatch: pytest.MonkeyPatch, oldest: int
) -> None:
    def takes(client: int, number: int) -> float:
        return 1.0 + 0.37 * client**2 + 0.11 * number

    recipe = late(
        f"federation.asynchronous.max_staleness={oldest}",
        "federation.clients_per_round=3",
        "federation.asynchronous.buffer_size=2",
    )
    monkeypatch.setattr(timetables, "duration", lambda recipe, size, client, number: takes(client, number))
    simulated, real = execute(recipe, run="simulated"), deployed(recipe, takes, run="deployed")
    assert merged(simulated.rounds) == merged(real)
    assert simulated.hashes == outcome("deployed").hashes
    assert [[(c.client, c.status) for c in r.client_records] for r in simulated.rounds] == [
        [(c.client, c.status) for c in r.client_records] for r in real
    ]


def test_an_answer_that_would_be_too_old_is_given_up_and_the_device_asked_anew(home: Path) -> None:
    asked: list[tuple[int, int]] = []

    def note(message: Message, reply: Message) -> Message:
        asked.append(order_of(message))
        return reply

    def takes(client: int, number: int) -> float:
        return 3.5 if client == 3 else 1.0

    rounds = deployed(late("federation.asynchronous.max_staleness=1"), takes, spoilt(note, range(4)))
    lost = [(r.number, c.client, c.status) for r in rounds for c in r.client_records if c.status != "merged"]
    assert lost == [(3, 3, "missing")]
    assert next(c.reason for c in rounds[3].client_records if c.client == 3).startswith("no reply within the rounds")
    assert [number for number, client in asked if client == 3] == [1, 4]
    assert all(client != 3 for taus in merged(rounds) for client in taus)


def test_a_device_that_fails_is_replaced_by_another_until_the_buffer_is_full(home: Path) -> None:
    def fail(message: Message, reply: Message) -> Message:
        raise ValueError("the battery is empty")

    recipe = late("federation.clients_per_round=2", "federation.asynchronous.buffer_size=2", "federation.rounds=3")
    for record in deployed(recipe, client=spoilt(fail, {1}))[1:]:
        statuses = [(c.client, c.status) for c in record.client_records]
        assert sum(status == "merged" for _, status in statuses) == 2
        assert all(status == ("error" if client == 1 else "merged") for client, status in statuses)


def test_a_round_that_nobody_is_left_for_ends_at_once_and_counts_only_with_its_quorum(home: Path) -> None:
    def fail(message: Message, reply: Message) -> Message:
        raise ValueError("the battery is empty")

    two = deployed(late("federation.quorum=2"), client=spoilt(fail, {0, 1}), run="two")
    assert [record.status for record in two] == ["completed"] * 6
    assert merged(two)[0] == {2: 0, 3: 0}
    with pytest.raises(RunError, match="no round got enough"):
        deployed(late("federation.quorum=3"), client=spoilt(fail, {0, 1}), run="three")
    failed = outcome("three").rounds[1]
    assert failed.reason.startswith("2 usable client updates, quorum 3; error")
    assert [c.status for c in failed.client_records] == ["error", "error", "unused", "unused"]


def test_the_deadline_ends_a_round_and_whoever_is_at_work_stays_there(home: Path) -> None:
    def takes(client: int, number: int) -> float:
        return NEVER if client > 1 else 1.0

    recipe = late("federation.deadline=0.5", "federation.rounds=2", "federation.quorum=2")
    rounds = deployed(recipe, takes)
    assert merged(rounds) == [{0: 0, 1: 0}] * 2
    assert [len(record.client_records) for record in rounds[1:]] == [2, 2]  # nobody is missing before ``oldest`` rounds
    assert all(0.5 <= record.seconds < 20 for record in rounds[1:])


def test_a_device_that_was_removed_is_missing(home: Path) -> None:
    rounds = deployed(late("federation.rounds=2"), gone=[2])
    statuses = [(sent.client, sent.status) for sent in rounds[1].client_records]
    assert statuses == [(0, "merged"), (1, "merged"), (2, "missing"), (3, "merged")]
    assert rounds[1].client_records[2].reason.startswith("its device was removed from the server")


def test_two_devices_that_were_removed_are_both_missing_also_where_rounds_wait_for_all(home: Path) -> None:
    rounds = deployed(trivial("federation.rounds=1"), gone=[1, 2])
    told = [(sent.status, sent.reason.partition(";")[0]) for sent in rounds[1].client_records]
    removed = ("missing", "its device was removed from the server")
    assert told == [("merged", ""), removed, removed, ("merged", "")]


@pytest.fixture
def store(home: Path) -> Iterator[Store]:
    with Store.open() as opened, silent():
        yield opened


def test_a_killed_server_loses_what_was_in_flight_and_goes_on_from_its_last_round(store: Store) -> None:
    recipe, stops = late(), [3]

    def stop(message: Message, reply: Message) -> Message:
        if order_of(message)[0] in stops:
            stops.clear()
            raise KeyboardInterrupt
        return reply

    run, client = begin(store, recipe), spoilt(stop, range(4))
    seat(store, run, recipe.num_clients)
    with pytest.raises(KeyboardInterrupt):
        run_to_completion(TickingGrid(4, client, slow), store, run)
    before = outcome(run)
    assert [record.number for record in before.rounds] == [0, 1, 2]
    store.reopen(run)
    run_to_completion(TickingGrid(4, client, slow), store, run)
    after = outcome(run)
    assert after.hashes[:3] == before.hashes
    assert [record.number for record in after.rounds] == list(range(6))
    assert merged(after.rounds)[2:] == [{0: 0, 1: 0, 2: 0}, {0: 0, 1: 0, 2: 0}, {0: 0, 1: 0, 3: 2}]


def test_a_simulation_repeats_and_resumes_bit_for_bit(store: Store) -> None:
    recipe, stops = late("devices=[{name: a, count: 3}, {name: b, count: 2, speed: 0.3}]", "federation.rounds=6"), [4]

    def stop(message: Message, reply: Message) -> Message:
        if order_of(message)[0] in stops:
            stops.clear()
            raise KeyboardInterrupt
        return reply

    whole, again = execute(recipe, run="whole"), execute(recipe, run="again")
    assert merged(whole.rounds) == merged(again.rounds)
    assert whole.hashes == again.hashes
    assert any(tau for taus in merged(whole.rounds) for tau in taus.values())
    run, client = begin(store, recipe, "stopped"), spoilt(stop, range(5))
    with pytest.raises(KeyboardInterrupt):
        run_to_completion(InProcessGrid(5, SequentialWorkers(client)), store, run)
    assert len(outcome(run).rounds) < 7
    store.reopen(run)
    run_to_completion(InProcessGrid(5, SequentialWorkers(client)), store, run)
    assert outcome(run).hashes == whole.hashes
    assert merged(outcome(run).rounds) == merged(whole.rounds)


def test_the_timetable_is_bounded_and_slow_classes_come_later_and_less_often() -> None:
    recipe = late(
        "devices=[{name: fast, count: 6}, {name: slow, count: 2, speed: 0.2}]",
        "federation.asynchronous={buffer: 4, oldest: 6}",
        "federation.rounds=60",
    )
    assert recipe.federation.asynchronous is not None
    planned = list(make_simulated_schedule(recipe, range(8), [100] * 8, recipe.federation.asynchronous))
    taus = [
        (number - begun, client) for number, one in enumerate(planned, 1) for client, begun in one.start_rounds.items()
    ]
    assert all(len(one.start_rounds) == 4 for one in planned)
    assert max(tau for tau, _ in taus) <= 6
    slow_ones, fast_ones = [t for t, c in taus if c > 5], [t for t, c in taus if c < 6]
    assert np.mean(slow_ones) > 3 * np.mean(fast_ones)
    # 6 fast devices and 2 at a fifth of the speed give 6.4 devices' work; the slow ones do 0.4 of it.
    assert len(slow_ones) / len(taus) == pytest.approx(0.4 / 6.4, rel=0.5)
    assert [one.end_seconds for one in planned] == sorted(one.end_seconds for one in planned)
    # Busy all the time they would train 6.4 examples a second; rounds of all eight would take the slow ones' 50 s.
    assert 60 * 4 * 10 / 6.4 < planned[-1].end_seconds < 30 * 50 / 2
