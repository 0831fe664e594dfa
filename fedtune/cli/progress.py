"""What a person sees while a run goes on: a live line in a terminal, one plain line per round elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from server.watch import Answered, Event, RoundEnded, RoundStarted, RunStarted, headline, summary, watcher

__all__ = ["watching"]


@contextmanager
def watching(rounds: int) -> Iterator[None]:
    """Show the events of a run of so many rounds on standard error while the block runs."""
    console = Console(stderr=True)
    live = console.is_terminal and not console.is_dumb_terminal
    with _live(console, rounds) if live else _plain(console, rounds) as show:
        token = watcher.set(show)
        try:
            yield
        finally:
            watcher.reset(token)


class _Clock:
    """Seconds left, from the rounds seen so far; round 0 is measured apart since it trains nothing."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._started = time.monotonic()
        self._first: int | None = None

    def start(self, first: int) -> None:
        self._first = first
        self._started = time.monotonic()

    def left(self, number: int) -> str:
        done = number - (self._first or 1) + 1
        left = round((time.monotonic() - self._started) / done * (self._rounds - number))
        return f"{left // 60}:{left % 60:02} left"


@contextmanager
def _plain(console: Console, rounds: int) -> Iterator[Callable[[Event], None]]:
    clock = _Clock(rounds)

    def show(event: Event) -> None:
        if isinstance(event, RunStarted):
            clock.start(event.first)
            print(headline(event), file=console.file, flush=True)
        elif isinstance(event, RoundEnded):
            number = event.record.number
            line = f"round {number}/{rounds}  {summary(event.record)}" + (f"  {clock.left(number)}" if number else "")
            print(line, file=console.file, flush=True)

    yield show


@contextmanager
def _live(console: Console, rounds: int) -> Iterator[Callable[[Event], None]]:
    clock = _Clock(rounds)
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


def _update(bars: Progress, round_bar: TaskID, client_bar: TaskID, clock: _Clock, event: Event) -> None:
    match event:
        case RunStarted():
            clock.start(event.first)
            bars.update(round_bar, completed=event.first - 1, note="")
        case RoundStarted():
            bars.reset(client_bar, total=event.clients, visible=True, note="")
        case Answered():
            bars.update(client_bar, advance=1, note=_answer(event))
        case RoundEnded():
            number = event.record.number
            bars.update(round_bar, completed=number, note=clock.left(number) if number else "")
            bars.console.print(f"round {number}  {summary(event.record)}", highlight=False)


def _answer(event: Answered) -> str:
    sent = event.contribution
    if sent.status != "merged":
        return f"client {sent.client} {sent.status}: {sent.reason}"
    return f"loss {sent.loss:.3f}" if sent.tells_loss else ""
