"""What the round loop tells whoever watches: events as they happen, printed as plain lines unless a watcher is set."""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

from fedtune.tracking import ContributionRecord, RoundRecord

__all__ = ["Answered", "Event", "RoundEnded", "RoundStarted", "RunStarted", "tell", "watcher"]


@dataclass(frozen=True)
class RunStarted:
    """The loop begins at ``first`` of ``rounds`` rounds."""

    run: str
    first: int
    rounds: int


@dataclass(frozen=True)
class RoundStarted:
    """Messages have gone out to ``clients`` clients."""

    number: int
    clients: int


@dataclass(frozen=True)
class Answered:
    """One client's reply has been dealt with."""

    number: int
    contribution: ContributionRecord


@dataclass(frozen=True)
class RoundEnded:
    """A round has been committed."""

    record: RoundRecord


Event = RunStarted | RoundStarted | Answered | RoundEnded


def _print(event: Event) -> None:
    print(event, flush=True)


watcher: ContextVar[Callable[[Event], None]] = ContextVar("watcher", default=_print)


def tell(event: Event) -> None:
    """Pass an event to the watcher of this context."""
    watcher.get()(event)
