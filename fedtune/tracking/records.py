"""What the store keeps, as frozen values: a run, its rounds, and what each round brought."""

import math
from dataclasses import dataclass
from datetime import datetime

__all__ = [
    "Assignment",
    "AuditRecord",
    "CheckpointRecord",
    "ClientRecord",
    "ClientScore",
    "DeviceRecord",
    "MetricRecord",
    "OperatorRecord",
    "RoundRecord",
    "RunRecord",
    "TokenRecord",
]

_OLD_ENGINES = {"local": "in-process"}


@dataclass(frozen=True, kw_only=True)
class MetricRecord:
    """One number of a ``part``: train, merge, updates, own, validation, test, test-before, privacy or simulation.

    ``domain`` is one of the data's, or ``all``.
    """

    part: str
    domain: str
    name: str
    value: float


@dataclass(frozen=True, kw_only=True)
class ClientRecord:
    """What one client did in one round; ``status`` is merged, refused, declined, error, missing or unused. In bytes.

    ``loss`` is NaN where the client keeps it to itself.

    ``staleness`` counts the rounds since the state it began with; None where rounds wait for their own answers only.
    """

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
    staleness: int | None = None

    @property
    def tells_loss(self) -> bool:
        """Whether the loss was told. Older runs kept a withheld one as 0 with examples 1."""
        return not math.isnan(self.loss) and (self.loss != 0 or self.examples != 1)


@dataclass(frozen=True, kw_only=True)
class ClientScore:
    """One figure of one client in a round, on what it held out.

    ``moment`` is ``before`` or ``after`` it trained, or ``shared``: of the model that the round ended with.
    """

    client: int
    moment: str
    name: str
    value: float
    predictions: int


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """A checkpoint: ``path`` relative to the runs folder, ``sha256`` over its tensors, size in bytes.

    One that was ``pruned`` is no longer on disk.
    """

    path: str
    sha256: str
    bytes: int
    pruned: bool = False


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """One round, completed or failed; number 0 holds the state and the metrics before any training."""

    number: int
    status: str
    reason: str
    seconds: float
    contributions: tuple[ClientRecord, ...]
    metrics: tuple[MetricRecord, ...]
    checkpoint: CheckpointRecord | None
    client_scores: tuple[ClientScore, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run without its rounds; ``status`` is queued, running, completed, failed or interrupted; ``recipe`` is JSON."""

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

    def __post_init__(self) -> None:
        """Read the engine's name of earlier versions as its name of today."""
        object.__setattr__(self, "engine", _OLD_ENGINES.get(self.engine, self.engine))


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Which device is a client of a run; ``node`` is its number on the SuperLink."""

    client: int
    device: str
    node: str


@dataclass(frozen=True, kw_only=True)
class DeviceRecord:
    """An enrolled device: its public key as PEM text, when it last told its profile, and that profile as JSON.

    ``tags`` are the operators', in order; the profile is the device's own word. ``quarantined`` says why it gets no
    orders, where that is so.
    """

    name: str
    node: str
    public_key: str
    enrolled: datetime
    seen: datetime | None
    profile: str
    tags: tuple[str, ...] = ()
    quarantined: str | None = None


@dataclass(frozen=True, kw_only=True)
class AuditRecord:
    """What a server refused or did (``kind``), for whom (an address, an operator, a device), in a sentence.

    The same happened ``times`` times from ``at`` to ``last``. Lines are numbered as they come.
    """

    id: int
    at: datetime
    kind: str
    who: str
    what: str
    times: int
    last: datetime


@dataclass(frozen=True, kw_only=True)
class OperatorRecord:
    """An operator and the SHA-256 of the key they show; ``role`` is read, submit or admin."""

    name: str
    sha256: str
    created: datetime
    role: str


@dataclass(frozen=True, kw_only=True)
class TokenRecord:
    """An enrolment token that was not spent: the SHA-256 of its secret, and whom it is for, if for one device only."""

    sha256: str
    device: str
    created: datetime
    expires: datetime
    tags: tuple[str, ...]
