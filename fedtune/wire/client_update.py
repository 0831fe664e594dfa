"""A client update: deltas in a safetensors payload, spooled to disk, checked and read in chunks."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedtune.errors import ClientUpdateError
from fedtune.wire.task_figures import TaskFigures
from fedtune.wire.tensor_payload import pack, packed_size

__all__ = [
    "DEVICE_TYPES",
    "FEWEST",
    "ClientReport",
    "ClientUpdate",
    "DriftScore",
    "HoldoutMetrics",
    "LowRankPair",
    "TensorSpec",
    "TrainRequest",
    "UpdateKind",
    "decode_tensors",
    "iter_row_chunks",
    "pack",
    "packed_size",
]

Shape = tuple[int, ...]
_PIECE = 1 << 18
"""The number of elements of a tensor read at a time. Larger blocks would stay in the allocator's heap after use."""


FEWEST = 5
"""Statistics over fewer examples than this stay on the device, because they could reveal single examples."""

DEVICE_TYPES = ("cpu", "cuda", "mps")
"""The types of devices that a client may train on. A report holds only numbers, so it names one by its place."""

UpdateKind = Literal["tensors", "one factor", "pairs", "pairs and base"]
"""What clients train.

"tensors" are merged one by one. "one factor" means that clients train one factor of each low-rank pair while they share
the other, so it is merged like tensors. "pairs" means that they train both factors, and "pairs and base" that they also
train a shared base.
"""


class LowRankPair(NamedTuple):
    """The names of two factors that change a weight together, by scale * left @ right or its transpose.

    ``left`` is [d, r, ...] and ``right`` is [r, k, ...]; further dimensions are those of a convolution. ``base`` is the
    weight itself if it is in the shared state.
    """

    left: str
    right: str
    scale: float
    base: str | None = None
    transposed: bool = False


class TensorSpec(NamedTuple):
    """The required form of an extra tensor in a client update.

    Integers lie in 0 .. upper_bound - 1, and their sum may be prescribed. ``negative`` is false for real numbers that
    are sums of sizes or counts.
    """

    shape: Shape
    dtype: str = "F32"
    upper_bound: int = 0
    required_sum: int | None = None
    negative: bool = True


@dataclass(frozen=True)
class TrainRequest:
    """The server's request to a client to train in a round of a run, sent with the shared state.

    ``recipe`` is JSON. ``label_names`` is a JSON list of the class names in the model's order, which a device cannot
    infer from its own data. With ``scoring``, the client only evaluates the state, which is the one after the round.
    ``base_digest`` is the digest of the base weights at the start of the round, if the server tracks them. The state
    holds the base weights in full, unless ``held_digest`` names the base weights that the state's increments are added
    to. ``plug_ins`` names what other packages publish of the recipe, see ``fedtune.recipe.required_plug_ins``.
    ``merged_round`` is the last round whose merge used an update of the client, 0 for none; it is sent for algorithms
    that keep something on devices. ``feedback_round`` is the round of the estimates that error feedback goes on from, 0
    for none; it is sent with error feedback.
    """

    recipe: str
    round: int
    client: int
    run_id: str
    label_names: str = "[]"
    scoring: bool = False
    base_digest: str | None = None
    held_digest: str | None = None
    plug_ins: str | None = None
    merged_round: int | None = None
    feedback_round: int | None = None


class HoldoutMetrics(NamedTuple):
    """Metrics of a model on a client's held-out examples: predictions, mean loss and accuracy.

    ``more`` are the recipe's further metrics in order. All are zero without held-out examples.
    """

    num_predictions: int = 0
    loss: float = 0.0
    accuracy: float = 0.0
    more: tuple[float, ...] = ()


class DriftScore(NamedTuple):
    """The drift signal of a batch of a client's examples, and how many examples it is of."""

    value: float
    num_examples: int


@dataclass(frozen=True)
class ClientReport:
    """What a client reports besides the deltas: examples, mean training loss, seconds and bytes of memory.

    ``loss`` is NaN if the client does not share it. ``activation_memory`` is the memory of activations kept for
    backward, ``peak_memory`` that of the process. ``micro_batch_size`` is None if the whole batch fitted in memory.

    ``device_code`` is the place of the device's type in ``DEVICE_TYPES``. A client that trained on the CPU leaves it
    out. One that only scored always has it, except in older versions, which did not say it. On CUDA,
    ``accelerator_memory`` and ``accelerator_reserved`` are torch's peaks of allocated and reserved memory.

    The holdout fields are metrics of the received model on held-out examples; ``extra_holdout_metrics`` are the
    recipe's further metrics. ``trained_holdout_metrics`` are loss, accuracy and further metrics of the trained model.
    Without held-out examples, counts and metrics are 0 and both lists are empty. In a stream, the lists of tasks have
    the metrics of each one. ``stored_bytes`` is what the device keeps on its disk for later tasks.

    ``num_examples`` weighs the client; it counts targets where ``train.weigh_by`` is ``tokens``.

    ``drift_score`` is the drift signal of ``drift_examples`` examples, None if there is none. ``anonymous_memory`` and
    ``file_memory`` are peaks of the two parts of the process's memory, None where the system does not tell them apart.
    ``plan_number`` is the place of the plan it trained with among those of the recipe, None if it was none of them.
    """

    num_examples: int
    loss: float
    seconds: float
    activation_memory: int
    peak_memory: int
    num_holdout_predictions: int = 0
    holdout_loss: float = 0.0
    holdout_accuracy: float = 0.0
    micro_batch_size: int | None = None
    device_code: int | None = None
    accelerator_memory: int | None = None
    accelerator_reserved: int | None = None
    extra_holdout_metrics: Sequence[float] = ()
    trained_holdout_metrics: Sequence[float] = ()
    task_predictions: Sequence[int] | None = None
    task_accuracies: Sequence[float] | None = None
    task_losses: Sequence[float] | None = None
    stored_bytes: int | None = None
    drift_score: float | None = None
    drift_examples: int | None = None
    anonymous_memory: int | None = None
    file_memory: int | None = None
    plan_number: int | None = None

    @property
    def drift(self) -> DriftScore | None:
        """The drift signal, or None if the client has none."""
        if self.drift_score is None or not self.drift_examples:
            return None
        return DriftScore(self.drift_score, self.drift_examples)

    @property
    def task_figures(self) -> TaskFigures | None:
        """The metrics of each task of a stream, or None if the client told none."""
        if self.task_predictions is None or self.task_accuracies is None or self.task_losses is None:
            return None
        return TaskFigures(self.task_predictions, self.task_accuracies, self.task_losses)

    @property
    def device_type(self) -> str:
        """The type of the device that the figures of a client that trained were measured on."""
        return DEVICE_TYPES[self.device_code or 0]

    @property
    def scoring_device_type(self) -> str | None:
        """The same of a client that only scored; None if it does not say."""
        return None if self.device_code is None else DEVICE_TYPES[self.device_code]

    @property
    def holdout_metrics(self) -> HoldoutMetrics | None:
        """The metrics of the received model, or None without held-out examples."""
        if not self.num_holdout_predictions:
            return None
        extra = tuple(self.extra_holdout_metrics)
        return HoldoutMetrics(self.num_holdout_predictions, self.holdout_loss, self.holdout_accuracy, extra)

    @property
    def trained_metrics(self) -> HoldoutMetrics | None:
        """The metrics of the trained model, or None without held-out examples."""
        if not (self.num_holdout_predictions and self.trained_holdout_metrics):
            return None
        loss, accuracy, *extra = self.trained_holdout_metrics
        return HoldoutMetrics(self.num_holdout_predictions, loss, accuracy, tuple(extra))

    def to_fields(self) -> dict[str, float | Sequence[float]]:
        """Return the fields to send: those that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class ClientUpdate:
    """A client update on disk.

    ``path`` holds one fp32 delta per trained tensor, which is multiplied by ``scale`` when read. ``device_type`` is
    that of the device that its metrics were computed on, None if not known.
    """

    client: int
    num_examples: int
    path: Path
    holdout_metrics: HoldoutMetrics | None = None
    trained_metrics: HoldoutMetrics | None = None
    scale: float = 1.0
    task_figures: TaskFigures | None = None
    drift: DriftScore | None = None
    device_type: str | None = None

    def list_tensor_names(self) -> set[str]:
        """Return the names of its tensors, including extra tensors besides the deltas."""
        with safe_open(self.path, "pt") as file:
            return set(file.keys())

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows ``start`` to ``stop`` of a delta from disk. A delta without dimensions counts as one row."""
        with safe_open(self.path, "pt") as file:
            rows = rows_of(file, name, start, stop)
        return rows if self.scale == 1.0 else rows * self.scale

    def read_tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read whole tensors. Use it for small ones."""
        with safe_open(self.path, "pt") as file:
            return {name: file.get_tensor(name) for name in names}


def iter_row_chunks(shape: Shape, together: int = 1) -> Iterator[tuple[int, int]]:
    """Yield row ranges of at most a few hundred thousand elements that cover a tensor. A scalar counts as one row.

    ``together`` is the number of models whose chunks are in memory at once; the chunks shrink accordingly.
    """
    height, *width = shape or (1,)
    step = max(1, _PIECE // max(1, math.prod(width) * together))
    for start in range(0, height, step):
        yield start, min(start + step, height)


def rows_of(file: Any, name: str, start: int, stop: int) -> Tensor:
    """Read rows ``start`` to ``stop`` of a tensor in an open safetensors file. A scalar counts as one row."""
    piece = file.get_slice(name)
    rows: Tensor = piece[start:stop] if piece.get_shape() else file.get_tensor(name)
    return rows


def decode_tensors(payload: bytes) -> dict[str, Tensor]:
    """Return the tensors of a payload; ClientUpdateError when it is not safetensors, for example a pickle."""
    try:
        return safetensors.torch.load(payload)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise ClientUpdateError(f"the payload is not safetensors ({error}); update the client") from error
