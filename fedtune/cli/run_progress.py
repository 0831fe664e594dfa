"""The progress of a run: live bars in a terminal, one line per round elsewhere."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from fedtune.server.events import (
    DriftNoticed,
    Event,
    ReplyReceived,
    RoundEnded,
    RoundStarted,
    RunStarted,
    Scoring,
    Unscored,
    describe_drift,
    describe_unscored_clients,
    event_handler,
    format_round,
    format_run_start,
)
from fedtune.tracking.sample_text import format_samples

__all__ = ["Clock", "show_run_progress"]

_QUIET_SECONDS = 10.0
"""Seconds between lines of a long scoring without a terminal."""


@contextmanager
def show_run_progress(rounds: int) -> Iterator[None]:
    """Show the events of a run on standard error while the block runs."""
    console = Console(stderr=True, markup=False)
    live = console.is_terminal and not console.is_dumb_terminal
    with _live(console, rounds) if live else _plain(console, rounds) as show:
        token = event_handler.set(show)
        try:
            yield
        finally:
            event_handler.reset(token)


class Clock:
    """Estimate the remaining time from the rounds and, separately, from the scored examples so far.

    ``now`` gives seconds of a clock that never goes back.
    """

    def __init__(self, rounds: int, now: Callable[[], float] = time.monotonic) -> None:
        self._rounds, self._now = rounds, now
        self._mark = now()
        self._number = 0
        self._ended, self._training = 0, 0.0
        self._scored, self._scoring = 0, 0.0
        self._ahead: Mapping[int, int] = {}
        self._done = 0

    def see(self, event: Event) -> None:
        """Record an event at the current time."""
        passed, self._mark = self._now() - self._mark, self._now()
        if isinstance(event, Scoring) and event.done:
            self._scoring += passed
            self._scored += event.done - self._done
        else:
            self._training += passed
        match event:
            case RunStarted():
                self._ahead, self._number, self._training = event.scoring, event.first_round - 1, 0.0
            case Scoring():
                self._done = event.done
            case RoundEnded():
                self._end(event.record.number)

    def _end(self, number: int) -> None:
        self._number = number
        self._ahead = {later: examples for later, examples in self._ahead.items() if later > number}
        if number:
            self._ended += 1
        else:
            self._training = 0.0  # before the first round nothing is trained

    def format_remaining_time(self) -> str:
        """Return the minutes and seconds left, including scoring; empty before the first round."""
        if not self._ended:
            return ""
        seconds = self._training / self._ended * (self._rounds - self._number)
        seconds += sum(self._ahead.values()) * self._scoring / max(1, self._scored)
        return f"{round(seconds) // 60}:{round(seconds) % 60:02} left"


@contextmanager
def _plain(console: Console, rounds: int) -> Iterator[Callable[[Event], None]]:
    clock = Clock(rounds)
    said = time.monotonic()

    def show(event: Event) -> None:
        nonlocal said
        clock.see(event)
        line = _line(event, clock, rounds)
        if isinstance(event, Scoring) and time.monotonic() - said < _QUIET_SECONDS:
            return
        if line:
            print(line, file=console.file, flush=True)
            said = time.monotonic()

    yield show


def _line(event: Event, clock: Clock, rounds: int) -> str:
    match event:
        case RunStarted():
            return format_run_start(event)
        case Scoring():
            return f"scoring {event.part}  {event.done}/{event.total}"
        case Unscored():
            return describe_unscored_clients(event)
        case DriftNoticed():
            return describe_drift(event)
        case RoundEnded():
            left = clock.format_remaining_time()
            line = f"round {event.record.number}/{rounds}  {format_round(event.record, event.main_metric)}"
            return "\n".join([f"{line}  {left}" if left else line, *format_samples(event.record.samples)])
    return ""


@contextmanager
def _live(console: Console, rounds: int) -> Iterator[Callable[[Event], None]]:
    clock = Clock(rounds)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        round_bar = bars.add_task("rounds", total=rounds, note="scoring the start")
        client_bar = bars.add_task("clients", total=None, note="", visible=False)
        yield lambda event: _update(bars, round_bar, client_bar, clock, event)


def _update(bars: Progress, round_bar: TaskID, client_bar: TaskID, clock: Clock, event: Event) -> None:
    clock.see(event)
    match event:
        case RunStarted():
            bars.update(round_bar, completed=event.first_round - 1, note="")
        case RoundStarted():
            bars.reset(client_bar, total=event.num_clients, visible=True, description="clients", note="")
        case ReplyReceived():
            bars.update(client_bar, advance=1, note=_describe_reply(event))
        case Scoring():
            scoring = f"scoring {event.part}"
            bars.update(client_bar, total=event.total, completed=event.done, visible=True, description=scoring, note="")
        case DriftNoticed():
            if line := describe_drift(event):
                bars.console.print(line, highlight=False)
        case Unscored():
            bars.console.print(describe_unscored_clients(event), highlight=False)
        case RoundEnded():
            number = event.record.number
            bars.update(round_bar, completed=number, note=clock.format_remaining_time())
            bars.console.print(f"round {number}  {format_round(event.record, event.main_metric)}", highlight=False)
            for line in format_samples(event.record.samples):
                bars.console.print(line, highlight=False)


def _describe_reply(event: ReplyReceived) -> str:
    sent = event.client_record
    if sent.status != "merged":
        return f"client {sent.client} {sent.status}: {sent.reason}"
    return f"loss {sent.train_loss:.3f}" if sent.tells_loss else ""
