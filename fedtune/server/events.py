"""What the round loop tells whoever watches: events as they happen, a line per round unless a watcher is set."""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

from fedtune.tracking import ClientRecord, MetricRecord, RoundRecord
from fedtune.tracking.run_summary import compute_train_loss

__all__ = [
    "Event",
    "ReplyReceived",
    "RoundEnded",
    "RoundStarted",
    "RunStarted",
    "Scoring",
    "Unscored",
    "describe_unscored_clients",
    "emit_event",
    "event_handler",
    "format_round",
    "format_run_start",
]


@dataclass(frozen=True)
class RunStarted:
    """The loop begins at ``first`` of ``rounds`` rounds."""

    run: str
    first_round: int
    last_round: int
    scoring: Mapping[int, int] = field(default_factory=dict)
    """Examples that are scored after each round from ``first`` on (and at the start, 0); empty when not known."""


@dataclass(frozen=True)
class RoundStarted:
    """Messages have gone out to ``clients`` clients."""

    number: int
    num_clients: int


@dataclass(frozen=True)
class ReplyReceived:
    """One client's reply has been dealt with."""

    number: int
    client_record: ClientRecord


@dataclass(frozen=True)
class Scoring:
    """``done`` of ``total`` examples of a part have been scored."""

    part: str
    done: int
    total: int


@dataclass(frozen=True)
class Unscored:
    """Of ``asked`` clients that were to score the state after a round, some gave no figures: why, by client."""

    number: int
    asked: int
    reasons: Mapping[str, str]


@dataclass(frozen=True)
class RoundEnded:
    """A round has been committed; ``main_metric`` is the metric that counts."""

    record: RoundRecord
    main_metric: str | None = None


Event = RunStarted | RoundStarted | ReplyReceived | Scoring | Unscored | RoundEnded


_NAMED = 5
"""So many rejected clients are named in a round's line; the store has them all."""


def format_run_start(event: RunStarted) -> str:
    """A run's first line."""
    return f"run {event.run}: rounds {event.first_round} to {event.last_round}"


def format_round(record: RoundRecord, main_metric: str | None = None) -> str:
    """A round in one line: who answered, losses, the validation figure, seconds."""
    shown = {"accuracy", "perplexity", "epsilon", main_metric}
    merged = [sent for sent in record.client_records if sent.status == "merged"]
    words = [f"{len(merged)}/{len(record.client_records)} clients"] if record.client_records else ["before training"]
    if any(sent.tells_loss for sent in merged):  # not where all withhold it
        words.append(f"train loss {compute_train_loss(merged):.4f}")
    words += [f"{m.split} {m.name} {m.value:.4f}" for m in record.metrics if m.name in shown and _is_newest(m)]
    rejected = [f"{sent.device} (client {sent.client})" for sent in record.client_records if sent.status == "rejected"]
    words += [f"rejected {', '.join(rejected[:_NAMED])}"] if rejected else []
    words.append(f"{record.seconds:.1f} s")
    return "  ".join(words) + (f"  FAILED: {record.reason}" if record.status == "failed" else "")


def describe_unscored_clients(event: Unscored) -> str:
    """Who gave no figures, in one line."""
    named = [f"{client}: {reason}" for client, reason in event.reasons.items()][:_NAMED]
    more = f"; and {len(event.reasons) - _NAMED} more" if len(event.reasons) > _NAMED else ""
    many = f"{len(event.reasons)} of {event.asked} clients did not score the shared model"
    return f"round {event.number}  {many}: {'; '.join(named)}{more}"


def _is_newest(metric: MetricRecord) -> bool:
    """Whether it is about all held-out examples of the round's own state."""
    return metric.split in ("validation", "local", "privacy") and metric.domain == "all"


def _print(event: Event) -> None:
    match event:
        case RunStarted():
            print(format_run_start(event), flush=True)
        case Unscored():
            print(describe_unscored_clients(event), flush=True)
        case RoundEnded():
            print(f"round {event.record.number}  {format_round(event.record, event.main_metric)}", flush=True)


event_handler: ContextVar[Callable[[Event], None]] = ContextVar("watcher", default=_print)


def emit_event(event: Event) -> None:
    """Pass an event to the watcher of this context."""
    event_handler.get()(event)
