"""Events of the round loop. Without a watcher, one line per round is printed."""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

from fedtune.tracking import ClientRecord, MetricRecord, RoundRecord
from fedtune.tracking.run_summary import compute_train_loss
from fedtune.tracking.sample_text import format_samples

__all__ = [
    "DriftNoticed",
    "Event",
    "ReplyReceived",
    "RoundEnded",
    "RoundStarted",
    "RunStarted",
    "Scoring",
    "Unscored",
    "describe_drift",
    "describe_unscored_clients",
    "emit_event",
    "event_handler",
    "format_round",
    "format_run_start",
]


@dataclass(frozen=True)
class RunStarted:
    """The loop starts with ``first_round`` and ends with ``last_round``."""

    run: str
    first_round: int
    last_round: int
    scoring: Mapping[int, int] = field(default_factory=dict)
    """The number of examples that are scored after each round, with 0 for the start; empty if unknown."""


@dataclass(frozen=True)
class RoundStarted:
    """Train requests were sent to ``num_clients`` clients."""

    number: int
    num_clients: int


@dataclass(frozen=True)
class ReplyReceived:
    """The reply of a client was received and checked."""

    number: int
    client_record: ClientRecord


@dataclass(frozen=True)
class Scoring:
    """``done`` of ``total`` examples of a split are scored."""

    part: str
    done: int
    total: int


@dataclass(frozen=True)
class Unscored:
    """Some of ``asked`` clients sent no scores of the state after a round. ``reasons`` are by client."""

    number: int
    asked: int
    reasons: Mapping[str, str]


@dataclass(frozen=True)
class RoundEnded:
    """A round was committed. ``main_metric`` is the name of the main metric."""

    record: RoundRecord
    main_metric: str | None = None


@dataclass(frozen=True)
class DriftNoticed:
    """The drift signals of a round were compared with the threshold. ``drifting`` are the signals of clients above it.

    ``rounds`` is for how many rounds the mean has been above, if that raises the alarm, else 0.
    """

    number: int
    drifting: Mapping[int, float]
    mean: float
    threshold: float
    rounds: int = 0


Event = RunStarted | RoundStarted | ReplyReceived | Scoring | Unscored | RoundEnded | DriftNoticed


_NAMED = 5
"""The number of rejected clients that are named in a line. The store contains all."""


def format_run_start(event: RunStarted) -> str:
    """Return the first line of a run."""
    return f"run {event.run}: rounds {event.first_round} to {event.last_round}"


def format_round(record: RoundRecord, main_metric: str | None = None) -> str:
    """Return a round in one line: number of clients, losses, validation metrics and seconds."""
    shown = {"accuracy", "perplexity", "epsilon", main_metric}
    merged = [sent for sent in record.client_records if sent.status == "merged"]
    words = [f"{len(merged)}/{len(record.client_records)} clients"] if record.client_records else ["before training"]
    if any(sent.tells_loss for sent in merged):  # not if no client reports it
        words.append(f"train loss {compute_train_loss(merged):.4f}")
    words += [f"{m.split} {m.name} {m.value:.4f}" for m in record.metrics if m.name in shown and _is_newest(m)]
    rejected = [f"{sent.device} (client {sent.client})" for sent in record.client_records if sent.status == "rejected"]
    words += [f"rejected {', '.join(rejected[:_NAMED])}"] if rejected else []
    words.append(f"{record.seconds:.1f} s")
    return "  ".join(words) + (f"  FAILED: {record.reason}" if record.status == "failed" else "")


def describe_unscored_clients(event: Unscored) -> str:
    """Return one line that names the clients without scores."""
    named = [f"{client}: {reason}" for client, reason in event.reasons.items()][:_NAMED]
    more = f"; and {len(event.reasons) - _NAMED} more" if len(event.reasons) > _NAMED else ""
    many = f"{len(event.reasons)} of {event.asked} clients did not score the shared model"
    return f"round {event.number}  {many}: {'; '.join(named)}{more}"


def describe_drift(event: DriftNoticed) -> str:
    """Return one line that names the clients that drift, and the alarm; empty if there is nothing to tell."""
    named = [f"client {client} drifts ({value:.2f})" for client, value in event.drifting.items()][:_NAMED]
    named += [f"{len(event.drifting) - _NAMED} more"] if len(event.drifting) > _NAMED else []
    if event.rounds:
        times = f"for {event.rounds} rounds" if event.rounds > 1 else "in this round"
        named.append(f"alarm: the mean {event.mean:.2f} has been above {event.threshold:.2f} {times}")
    elif named:
        named.append(f"the threshold is {event.threshold:.2f}")
    return f"round {event.number}  {'; '.join(named)}" if named else ""


def _is_newest(metric: MetricRecord) -> bool:
    """Whether the metric is over all domains and measured on the round's own state."""
    return metric.split in ("validation", "local", "privacy") and metric.domain == "all"


def _print(event: Event) -> None:
    match event:
        case RunStarted():
            print(format_run_start(event), flush=True)
        case Unscored():
            print(describe_unscored_clients(event), flush=True)
        case DriftNoticed():
            if line := describe_drift(event):
                print(line, flush=True)
        case RoundEnded():
            lines = [
                f"round {event.record.number}  {format_round(event.record, event.main_metric)}",
                *format_samples(event.record.samples),
            ]
            print("\n".join(lines), flush=True)


event_handler: ContextVar[Callable[[Event], None]] = ContextVar("watcher", default=_print)


def emit_event(event: Event) -> None:
    """Pass an event to the watcher of this context."""
    event_handler.get()(event)
