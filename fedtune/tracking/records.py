"""What the store keeps, as frozen values: a run, its rounds, and what each round brought."""

import math
from dataclasses import dataclass
from datetime import datetime

from fedtune.tracking.task_records import TaskRecord, TaskScore

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
    "SampleRecord",
    "TokenRecord",
]

_OLD_ENGINES = {"local": "in-process"}


@dataclass(frozen=True, kw_only=True)
class MetricRecord:
    """One metric of a round.

    ``split`` is what was scored: train, validation, test, test-before or local (what clients hold out). A metric of no
    split has its subject there: merge, updates, privacy, simulation or end. ``domain`` is one of the data's, ``mean``
    or ``all``. ``device_type`` is that of the device the metric was computed on; of a mean over clients, all their
    types, as in ``cpu+cuda``. It is None for what no model was scored for, and in rounds recorded before it was.
    """

    split: str
    domain: str
    name: str
    value: float
    device_type: str | None = None


@dataclass(frozen=True, kw_only=True)
class ClientRecord:
    """What one client did in one round. Sizes are in bytes.

    ``status`` is merged, rejected, declined, error, missing or unused. ``device_name`` is None in a simulation, and
    ``device_class`` in runs on real devices that were recorded before it was. ``train_loss`` is NaN if the client does
    not report it. ``staleness`` counts the rounds since the state the client began with, None in synchronous runs.

    ``device_type`` is that of the device that the figures were measured on: cpu, cuda or mps. It is None if nothing was
    measured, and in rounds that were recorded before it was. ``accelerator_memory`` and ``accelerator_reserved`` are
    torch's peaks on CUDA. ``stored_bytes`` is what the device keeps on its disk for later tasks of a stream, None in
    runs without one. ``anonymous_memory`` and ``file_memory`` are the peaks of the two parts of the process's memory,
    None where its system does not tell them apart. ``predicted_anonymous`` and ``predicted_total`` are what its plan
    predicts, before any learned correction; None if its settings were not planned.
    """

    client: int
    device_class: str | None
    device_name: str | None = None
    status: str
    reason: str
    num_examples: int
    bytes_down: int
    bytes_up: int
    seconds: float
    activation_memory: int
    peak_memory: int
    update_norm: float
    train_loss: float
    staleness: int | None = None
    device_type: str | None = None
    accelerator_memory: int | None = None
    accelerator_reserved: int | None = None
    stored_bytes: int | None = None
    anonymous_memory: int | None = None
    file_memory: int | None = None
    predicted_anonymous: int | None = None
    predicted_total: int | None = None

    @property
    def device(self) -> str:
        """The name of the device, or in a simulation its class."""
        return self.device_name or self.device_class or ""

    @property
    def prediction_error(self) -> float | None:
        """The share by which it held more anonymous memory than predicted; None if one of them is not known."""
        if not self.predicted_anonymous or not self.anonymous_memory:
            return None
        return self.anonymous_memory / self.predicted_anonymous - 1

    @property
    def tells_loss(self) -> bool:
        """Whether the client reported its loss. Older runs recorded a withheld one as 0 with one example."""
        return not math.isnan(self.train_loss) and (self.train_loss != 0 or self.num_examples != 1)


@dataclass(frozen=True, kw_only=True)
class ClientScore:
    """One metric of one client in a round, on what it held out.

    ``moment`` is ``before`` or ``after`` it trained, or ``shared`` for the model at the end of the round.
    ``device_type`` is that of the device it was computed on: cpu, cuda or mps; None if not known.
    """

    client: int
    moment: str
    name: str
    value: float
    num_predictions: int
    device_type: str | None = None


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """A checkpoint: its ``path`` in the runs folder, the SHA-256 of its tensors, and its size in bytes.

    A ``pruned`` one is no longer on disk. In a stream, a round that ends a task has the server's memory beside it.
    """

    path: str
    sha256: str
    bytes: int
    pruned: bool = False
    memory_sha256: str | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class SampleRecord:
    """What the model of a round generated for prompt ``number`` of the recipe, counted from 1.

    ``prompt`` is the text or, of a conversation, JSON. ``ended`` says whether the model ended the text itself; else it
    reached ``max_new_tokens``.
    """

    number: int
    prompt: str
    text: str
    ended: bool


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """One round, completed or failed. Number 0 has the state and the metrics before any training.

    ``device_type`` is that of the device that the server scored and generated samples on, None if it was not recorded.
    ``tasks`` are the visits of a stream that begin in the round; ``ends_visit`` is the one that ends with it.
    """

    number: int
    status: str
    reason: str
    seconds: float
    client_records: tuple[ClientRecord, ...]
    metrics: tuple[MetricRecord, ...]
    checkpoint: CheckpointRecord | None
    client_scores: tuple[ClientScore, ...] = ()
    device_type: str | None = None
    samples: tuple[SampleRecord, ...] = ()
    task_scores: tuple[TaskScore, ...] = ()
    tasks: tuple[TaskRecord, ...] = ()
    ends_visit: int | None = None


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run without its rounds.

    ``status`` is queued, running, completed, failed or interrupted; ``recipe`` is JSON.
    """

    id: str
    name: str
    status: str
    reason: str
    recipe: str
    seed: int
    engine: str
    created_at: datetime
    finished_at: datetime | None
    rounds_planned: int
    rounds_completed: int

    def __post_init__(self) -> None:
        """Read the engine's name of earlier versions as its name of today."""
        object.__setattr__(self, "engine", _OLD_ENGINES.get(self.engine, self.engine))


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Which device is a client of a run. ``node_id`` is the device's number on the SuperLink."""

    client: int
    device_name: str
    node_id: str


@dataclass(frozen=True, kw_only=True)
class DeviceRecord:
    """An enrolled device: its public key as PEM text, when it last sent its profile, and that profile as JSON.

    Operators give it ``tags``, which are sorted. A device with a ``quarantine_reason`` gets no train requests.
    """

    name: str
    node_id: str
    public_key: str
    enrolled_at: datetime
    last_seen_at: datetime | None
    profile: str
    tags: tuple[str, ...] = ()
    quarantine_reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class AuditRecord:
    """A line of the audit: what a server refused or did (``outcome``), and for which address, operator or device.

    The same happened ``times`` times from ``recorded_at`` to ``last_recorded_at``. Lines are numbered in order.
    """

    id: int
    recorded_at: datetime
    outcome: str
    actor: str
    message: str
    times: int
    last_recorded_at: datetime


@dataclass(frozen=True, kw_only=True)
class OperatorRecord:
    """An operator and the SHA-256 of their key. ``role`` is read, submit or admin."""

    name: str
    key_sha256: str
    created_at: datetime
    role: str


@dataclass(frozen=True, kw_only=True)
class TokenRecord:
    """An unused enrolment token: the SHA-256 of its secret, and the device it is for; None for any device."""

    sha256: str
    device_name: str | None
    created_at: datetime
    expires_at: datetime
    tags: tuple[str, ...]
