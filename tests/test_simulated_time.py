"""Simulated time: deadlines, dropouts and "ask more, take the first" follow from the recipe, not from the machine."""

import time
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.device.client_app import app
from fedtune.errors import RecipeError
from fedtune.recipe.schema import Recipe
from fedtune.server.scheduling.round_scheduler import (
    DROPPED_OUT,
    NO_REPLY_BEFORE_DEADLINE,
    NOT_NEEDED,
    SynchronousScheduler,
)
from fedtune.server.scheduling.simulated_schedule import make_simulated_schedule
from fedtune.server.scheduling.simulated_time import drops_out, duration, plan_round
from fedtune.server.selection import sample_cohort
from fedtune.server.server_app import run_to_completion
from fedtune.simulation.in_process_grid import InProcessGrid
from fedtune.simulation.workers import SequentialWorkers
from fedtune.tracking import RoundRecord, Store
from tests.federations import Ended, begin, execute, order_of, outcome, spoilt, trivial

CLASSES = "devices=[{name: fast, count: 3, speed: 20}, {name: slow, count: 2, speed: 4}]"  # 2 steps of 10: 1 s and 5 s
HURRIED = (CLASSES, "federation.deadline=4", "federation.rounds=4")


def tarrying(message: Message, reply: Message) -> Message:
    time.sleep(0.3)
    return reply


def statuses(record: RoundRecord) -> dict[int, tuple[str, str]]:
    return {one.client: (one.status, one.reason) for one in record.client_records}


def by_hand(recipe: Recipe, number: int) -> dict[int, tuple[str, str]]:
    """What a deadline does, said slowly."""
    found: dict[int, tuple[str, str]] = {}
    for client in sample_cohort(recipe, number):
        late = duration(recipe, 0, client, number) > (recipe.federation.deadline or np.inf)
        found[client] = ("missing", NO_REPLY_BEFORE_DEADLINE) if late else ("merged", "")
    return found


def test_a_deadline_is_simulated_so_that_a_busy_machine_ends_with_the_same_bits(home: Path) -> None:
    recipe = trivial(*HURRIED)
    quiet = execute(recipe, run="quiet")
    busy = execute(recipe, spoilt(tarrying, range(5)), run="busy")
    assert quiet.hashes == busy.hashes
    assert [statuses(one) for one in quiet.rounds] == [statuses(one) for one in busy.rounds]
    for record in quiet.rounds[1:]:
        assert statuses(record) == by_hand(recipe, record.number)
    late = [status for record in quiet.rounds for status, _ in statuses(record).values() if status == "missing"]
    assert 4 <= len(late) <= 8  # of two slow clients in four rounds, whose median is a second too long


def test_a_real_second_is_no_simulated_one(home: Path) -> None:
    """The deadline is far below what the machine takes, and nobody is late."""
    ended = execute(trivial("devices=[{count: 2, speed: 1e6}]", "federation.deadline=0.001"))
    assert {status for record in ended.rounds for status, _ in statuses(record).values()} == {"merged"}


def test_a_class_that_names_no_speed_is_never_late(home: Path) -> None:
    ended = execute(trivial("devices=[{name: any, count: 2}, {name: slow, count: 1, speed: 0.001}]", *HURRIED[1:]))
    assert statuses(ended.rounds[1]) == {0: ("merged", ""), 1: ("merged", ""), 2: ("missing", NO_REPLY_BEFORE_DEADLINE)}
    assert not simulated_seconds(ended)


def simulated_seconds(ended: Ended) -> list[float]:
    return [one.value for record in ended.rounds for one in record.metrics if one.split == "simulation"]


def test_a_round_takes_as_long_as_its_slowest_or_its_deadline(home: Path) -> None:
    recipe = trivial(CLASSES, "federation.rounds=3")
    waiting, hurried = execute(recipe, run="waiting"), execute(trivial(*HURRIED), run="hurried")
    slowest = [max(duration(recipe, 0, client, number) for client in range(5)) for number in (1, 2, 3)]
    assert simulated_seconds(waiting) == slowest
    late = [any(status == "missing" for status, _ in statuses(one).values()) for one in hurried.rounds[1:]]
    assert [one == 4.0 for one in simulated_seconds(hurried)] == late
    assert any(late)


def test_the_first_replies_are_taken_and_the_others_never_trained(home: Path) -> None:
    trained: list[int] = []

    def note(message: Message, reply: Message) -> Message:
        trained.append(order_of(message)[1])
        return reply

    recipe = trivial(CLASSES, "federation.take_first=3", "federation.rounds=2")
    ended = execute(recipe, spoilt(note, range(5)))
    for record in ended.rounds[1:]:
        order = sorted(range(5), key=lambda client: duration(recipe, 0, client, record.number))
        expected = {client: ("merged", "") if client in order[:3] else ("missing", NOT_NEEDED) for client in range(5)}
        assert statuses(record) == expected
        assert simulated_seconds(ended)[record.number - 1] == duration(recipe, 0, order[2], record.number)
    assert len(trained) == 6


def test_the_next_in_line_is_taken_where_a_reply_is_of_no_use(home: Path) -> None:
    def failing(message: Message, reply: Message) -> Message:
        raise ValueError("no")

    recipe = trivial(CLASSES, "federation.take_first=3", "federation.rounds=1")
    first, *others = sorted(range(5), key=lambda client: duration(recipe, 0, client, 1))
    ended = execute(recipe, spoilt(failing, {first}))
    found = {client: status for client, (status, _) in statuses(ended.rounds[1]).items()}
    assert found == {first: "error"} | dict.fromkeys(others[:3], "merged") | dict.fromkeys(others[3:], "missing")


def test_dropouts_are_drawn_by_class_and_round_and_counted() -> None:
    recipe = trivial("devices=[{name: a, count: 50, dropout: 0.3}, {name: b, count: 50}]", "federation.deadline=9")
    rounds = range(1, 101)
    found = np.array([[drops_out(recipe, client, number) for client in range(100)] for number in rounds])
    assert found[:, 50:].sum() == 0
    assert found[:, :50].mean() == pytest.approx(0.3, abs=0.03)
    assert found[:, :50].mean(0).std() == pytest.approx((0.3 * 0.7 / 100) ** 0.5, rel=0.3)  # independent draws
    plan = plan_round(recipe, range(100), [10] * 100, 1)
    assert plan.absent == {client: DROPPED_OUT for client in range(100) if found[0, client]}


def test_durations_follow_speed_and_spread() -> None:
    recipe = trivial("devices=[{name: a, count: 1, speed: 4, spread: 0}, {name: b, count: 1, speed: 2, spread: 0.5}]")
    assert duration(recipe, 0, 0, 1) == duration(recipe, 0, 0, 2) == 20 / 4
    drawn = np.log([duration(recipe, 0, 1, number) for number in range(1, 2001)])
    assert drawn.mean() == pytest.approx(np.log(20 / 2), abs=0.05)
    assert drawn.std() == pytest.approx(0.5, rel=0.1)
    epochs = trivial("train.local_steps=null", "train.local_epochs=3", "devices=[{count: 1, speed: 2, spread: 0}]")
    assert duration(epochs, 7, 0, 1) == 7 * 3 / 2


@pytest.mark.parametrize(
    "overrides",
    [
        ("federation.deadline=4",),
        ("federation.take_first=2",),
        ("federation.deadline=9", "devices=[{name: a, count: 5, dropout: 0.4}]"),
        ("federation.asynchronous={buffer: 2}", "federation.deadline=3"),
    ],
)
def test_a_resumed_run_ends_with_the_bits_of_one_left_alone(home: Path, overrides: tuple[str, ...]) -> None:
    recipe = trivial(CLASSES, "federation.rounds=5", "federation.fraction_train=0.8", *overrides)
    whole = execute(recipe, run="whole")

    def stopping(message: Message, reply: Message) -> Message:
        if order_of(message)[0] == 4:
            raise KeyboardInterrupt
        return reply

    with Store.open() as store:
        begin(store, recipe, "stopped")
        with pytest.raises(KeyboardInterrupt):
            carry_on(store, recipe, spoilt(stopping, range(5)))
        carry_on(store, recipe, app)
    assert outcome("stopped").hashes == whole.hashes
    assert [statuses(one) for one in outcome("stopped").rounds] == [statuses(one) for one in whole.rounds]


def carry_on(store: Store, recipe: Recipe, client: ClientApp) -> None:
    run_to_completion(InProcessGrid(recipe.num_clients, SequentialWorkers(client)), store, "stopped")


def test_a_late_answer_waits_for_the_round_after_the_deadline(home: Path) -> None:
    recipe = trivial(
        "devices=[{name: a, count: 3, speed: 20, spread: 0}, {name: b, count: 1, speed: 4, spread: 0}]",
        "federation.asynchronous={buffer: 4, staleness: 0}",
        "federation.deadline=2",
        "federation.rounds=3",
    )
    ended = execute(recipe)
    taken = [{one.client: one.staleness for one in record.client_records} for record in ended.rounds[1:]]
    assert taken == [{0: 0, 1: 0, 2: 0}, {0: 0, 1: 0, 2: 0}, {0: 0, 1: 0, 2: 0, 3: 2}]
    assert simulated_seconds(ended) == [2.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["federation.take_first=5"], "take_first is 5, above the 4 clients"),
        (["federation.take_first=2", "federation.quorum=3"], "quorum is 3, but take_first ends a round with 2"),
        (
            ["federation.take_first=2", "federation.asynchronous.buffer_size=2"],
            "take_first and asynchronous exclude each other",
        ),
        (["devices=[{count: 4, dropout: 0.1}]"], "a round would wait for ever"),
        (["devices=[{count: 4, dropout: 1}]", "federation.deadline=3"], "dropout"),
        (["devices=[{count: 4, speed: 0}]"], "speed"),
        (["devices=[{count: 4, spread: -1}]"], "spread"),
    ],
)
def test_settings_that_do_not_hold_are_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        trivial(*overrides)


class Deaf(SequentialWorkers):
    """One node never gets its message."""

    def submit(self, number: str, message: Message, context: Context) -> None:
        """Queue a message unless it is for the last node."""
        if message.metadata.dst_node_id != 2 + 3:
            super().submit(number, message, context)


@pytest.mark.parametrize(
    ("overrides", "reason", "merged"),
    [(("federation.deadline=3",), NO_REPLY_BEFORE_DEADLINE, 3), (("federation.take_first=2",), NOT_NEEDED, 2)],
)
def test_on_devices_the_clock_is_the_real_one(
    home: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], reason: str, merged: int
) -> None:
    """The scheduler that real devices get: a node that stays silent costs the round its deadline, not for ever."""
    monkeypatch.setattr(
        "fedtune.server.scheduling.factory.Simulated",
        lambda grid, recipe, among, sizes, poll, last: SynchronousScheduler(grid, recipe, among, poll, last),
    )
    recipe = trivial("federation.rounds=1", *overrides)
    with Store.open() as store:
        begin(store, recipe)
        started = time.monotonic()
        run_to_completion(InProcessGrid(recipe.num_clients, Deaf(app)), store, "run-1")
    found = list(statuses(outcome().rounds[1]).values())
    assert found == [("merged", "")] * merged + [("missing", reason)] * (4 - merged)
    if merged == 3:
        assert time.monotonic() - started >= 3


def test_a_timetable_of_two_thousand_rounds_is_made_round_by_round() -> None:
    """The first round is there at once, also where a run is long and the federation large."""
    recipe = trivial(
        "devices=[{count: 1000, speed: 1}]", "federation={rounds: 1000000, clients: 100, late: {buffer: 50}}"
    )
    assert recipe.federation.asynchronous is not None
    started = time.process_time()
    first = next(make_simulated_schedule(recipe, range(1000), [10] * 1000, recipe.federation.asynchronous))
    assert len(first.start_rounds) == 50
    assert time.process_time() - started < 5
