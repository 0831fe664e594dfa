"""What the store keeps, as frozen values: a run, its rounds, and what each round brought."""

from dataclasses import dataclass
from datetime import datetime

__all__ = ["CheckpointRecord", "ContributionRecord", "MetricRecord", "RoundRecord", "RunRecord"]


@dataclass(frozen=True, kw_only=True)
class MetricRecord:
    """One number: ``part`` is train, validation, test or test-before; ``domain`` is a domain's name or ``all``."""

    part: str
    domain: str
    name: str
    value: float


@dataclass(frozen=True, kw_only=True)
class ContributionRecord:
    """What one client did in one round; ``status`` is merged, refused, error, missing or unused. In bytes."""

    client: int
    device: str
    status: str
    reason: str
    examples: int
    bytes_down: int
    bytes_up: int
    seconds: float
    saved_bytes: int
    peak_rss: int
    norm: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """A checkpoint on disk: ``path`` relative to the runs folder, ``sha256`` over its tensors, size in bytes."""

    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """One round, completed or failed; number 0 holds the state and the metrics before any training."""

    number: int
    status: str
    reason: str
    seconds: float
    contributions: tuple[ContributionRecord, ...]
    metrics: tuple[MetricRecord, ...]
    checkpoint: CheckpointRecord | None


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run without its rounds; ``status`` is running, completed, failed or interrupted, ``recipe`` is JSON text."""

    id: str
    name: str
    status: str
    reason: str
    recipe: str
    seed: int
    engine: str
    created: datetime
    finished: datetime | None
    rounds_planned: int
    rounds_completed: int
