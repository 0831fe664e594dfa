"""The time that is left counts what is still to be scored, and a scoring tells how far it is."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from fedtune.cli import run_progress
from fedtune.cli.run_progress import Clock
from fedtune.device.client_app import app
from fedtune.server.events import Event, ReplyReceived, RoundEnded, RoundStarted, RunStarted, Scoring
from fedtune.server.server_app import run_to_completion
from fedtune.simulation.in_process_grid import InProcessGrid
from fedtune.simulation.workers import SequentialWorkers
from fedtune.tracking import Store, claim_run
from tests.federations import begin, execute, silent, trivial
from tests.store_examples import a_client_record, a_round


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def play(clock: Clock, time: Time, *events: tuple[float, Event]) -> None:
    for seconds, event in events:
        time.now += seconds
        clock.see(event)


def ended(number: int) -> RoundEnded:
    return RoundEnded(a_round(number))


def test_what_is_left_is_rounds_to_train_and_examples_to_score() -> None:
    time = Time()
    clock = Clock(3, time)
    play(
        clock,
        time,
        (7.0, RunStarted("run", 1, 3, {0: 50, 2: 50, 3: 450})),
        (0.0, Scoring("validation", 0, 50)),
        (5.0, Scoring("validation", 50, 50)),
        (1.0, ended(0)),
    )
    assert clock.format_remaining_time() == ""
    play(clock, time, (0.5, RoundStarted(1, 2)), (19.0, ReplyReceived(1, a_client_record(0))), (0.5, ended(1)))
    assert clock.format_remaining_time() == "1:30 left"  # two rounds of 20 s, 500 examples at 0.1 s
    play(
        clock,
        time,
        (20.0, Scoring("validation", 0, 50)),
        (4.0, Scoring("validation", 40, 50)),
        (1.0, Scoring("validation", 50, 50)),
        (0.0, ended(2)),
    )
    assert clock.format_remaining_time() == "1:05 left"
    play(clock, time, (20.0, Scoring("test", 0, 450)), (45.0, Scoring("test", 450, 450)), (0.0, ended(3)))
    assert clock.format_remaining_time() == "0:00 left"


def test_a_resumed_run_counts_its_own_rounds_only() -> None:
    time = Time()
    clock = Clock(6, time)
    play(clock, time, (30.0, RunStarted("run", 4, 6)), (10.0, ended(4)))
    assert clock.format_remaining_time() == "0:20 left"


def test_the_start_is_not_taken_for_a_round() -> None:
    time = Time()
    clock = Clock(2, time)
    play(clock, time, (1.0, RunStarted("run", 1, 2)), (600.0, ended(0)), (10.0, ended(1)))
    assert clock.format_remaining_time() == "0:10 left"


def test_a_scoring_tells_how_far_it_is_and_a_recipe_may_score_fewer_examples_before_the_end(home: Path) -> None:
    recipe = trivial("evaluation={examples: 30, batch: 25}", "federation.rounds=2")
    with Store.open() as store, claim_run(begin(store, recipe)), silent() as seen:
        run_to_completion(InProcessGrid(recipe.num_clients, SequentialWorkers(app)), store, "run-1")
    [started] = [event for event in seen if isinstance(event, RunStarted)]
    told = [(event.part, event.done, event.total) for event in seen if isinstance(event, Scoring)]
    whole, test = told[6][2], told[-1][2]
    assert told[:6] == [("validation", done, 30) for done in (0, 25, 30)] * 2
    assert whole > 30
    assert started.scoring == {0: 30, 1: 30, 2: whole + 2 * test}
    assert {part for part, done, total in told if done == total} == {"validation", "test", "test-before"}


def test_what_is_scored_at_the_end_does_not_depend_on_what_was_scored_before(home: Path) -> None:
    some = execute(trivial("evaluation.max_examples=30"), run="some")
    every = execute(trivial(), run="every")
    assert some.rounds[-1].metrics == every.rounds[-1].metrics
    assert some.rounds[0].metrics != every.rounds[0].metrics
    assert some.rounds[-1].checkpoint is not None
    assert every.rounds[-1].checkpoint is not None
    assert some.rounds[-1].checkpoint.sha256 == every.rounds[-1].checkpoint.sha256


def test_without_a_terminal_a_long_scoring_says_so_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    time, out = Time(), io.StringIO()
    monkeypatch.setattr("time.monotonic", time)
    with run_progress._plain(Console(file=out), 1) as show:
        show(RunStarted("run", 1, 1))
        for done in range(0, 100, 10):
            time.now += 4.0
            show(Scoring("test", done, 100))
    assert out.getvalue().splitlines() == [
        "run run: rounds 1 to 1",
        "scoring test  20/100",
        "scoring test  50/100",
        "scoring test  80/100",
    ]


def test_in_a_terminal_the_lower_bar_shows_it() -> None:
    out = io.StringIO()
    with run_progress._live(Console(file=out, force_terminal=True, width=100), 1) as show:
        for event in (RunStarted("run", 1, 1), RoundStarted(1, 2), Scoring("test", 64, 4297)):
            show(event)
        show(ended(1))
    assert "scoring test" in out.getvalue()
    assert "64/4297" in out.getvalue()
