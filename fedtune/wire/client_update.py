"""A client update: deltas in one safetensors payload, which is checked, spooled to disk and read in chunks."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedtune.errors import ClientUpdateError
from fedtune.wire.tensor_payload import pack, packed_size

__all__ = [
    "FEWEST",
    "ClientReport",
    "ClientUpdate",
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
"""Elements of a tensor that are held at a time; larger blocks would stay in the allocator's heap after use."""


FEWEST = 5
"""A figure over fewer examples of a device than these stays there: it would tell of single examples."""

UpdateKind = Literal["tensors", "one factor", "pairs", "pairs and base"]
"""What clients train: tensors that are merged one by one; one factor of low-rank pairs at a time, the other being
common, merged like tensors; both factors; these beside a shared base.
"""


class LowRankPair(NamedTuple):
    """Names of two factors that mean something only together: a weight gains scale * left @ right, or its transpose.

    ``left`` is [d, r, ...] and ``right`` [r, k, ...], further dimensions being a convolution's; ``base`` is the weight
    itself where it belongs to the shared state.
    """

    left: str
    right: str
    scale: float
    base: str | None = None
    transposed: bool = False


class TensorSpec(NamedTuple):
    """What a further tensor of a client update must look like; integers lie in 0 .. below - 1 and may have a sum.

    Real numbers that are sums of sizes or counts are never ``negative``.
    """

    shape: Shape
    dtype: str = "F32"
    upper_bound: int = 0
    required_sum: int | None = None
    negative: bool = True


@dataclass(frozen=True)
class TrainRequest:
    """What the server requests of a client, beside the shared state: to train in a round of a run.

    ``recipe`` is JSON. ``label_names``, a JSON list, are the class names in the model's order, which a device cannot
    tell from its own data. With ``scoring`` the client only scores the state, which is that after the round.
    ``base_digest`` is the digest of the base weights the round begins with, where the server keeps track of them. The
    state holds these whole, unless ``held_digest`` names those to which the state's increments are to be added.
    """

    recipe: str
    round: int
    client: int
    run_id: str
    label_names: str = "[]"
    scoring: bool = False
    base_digest: str | None = None
    held_digest: str | None = None


class HoldoutMetrics(NamedTuple):
    """A model on what a client held out: predictions, mean loss and accuracy; zeros when it held out nothing.

    ``more`` are the recipe's further metrics in its order.
    """

    num_predictions: int = 0
    loss: float = 0.0
    accuracy: float = 0.0
    more: tuple[float, ...] = ()


@dataclass(frozen=True)
class ClientReport:
    """What a client reports of its round, beside the deltas: work done, mean training loss, seconds and bytes.

    ``loss`` is NaN where the client keeps it to itself. ``activation_memory`` is what activations kept for backward
    took, ``peak_memory`` what the process held. ``micro_batch_size`` is None where memory held the whole batch.
    The holdout fields score the received model on examples that were held out, ``extra_holdout_metrics`` by the
    recipe's further metrics. ``trained_holdout_metrics`` are loss, accuracy and further metrics of the trained model.
    Without held-out examples, counts and scores are 0 and both lists empty.
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
    extra_holdout_metrics: Sequence[float] = ()
    trained_holdout_metrics: Sequence[float] = ()

    @property
    def holdout_metrics(self) -> HoldoutMetrics | None:
        """The score of the received model; None without held-out examples."""
        if not self.num_holdout_predictions:
            return None
        extra = tuple(self.extra_holdout_metrics)
        return HoldoutMetrics(self.num_holdout_predictions, self.holdout_loss, self.holdout_accuracy, extra)

    @property
    def trained_metrics(self) -> HoldoutMetrics | None:
        """The score of the trained model; None without held-out examples."""
        if not (self.num_holdout_predictions and self.trained_holdout_metrics):
            return None
        loss, accuracy, *extra = self.trained_holdout_metrics
        return HoldoutMetrics(self.num_holdout_predictions, loss, accuracy, tuple(extra))

    def to_fields(self) -> dict[str, float | Sequence[float]]:
        """The fields that travel: without those that are None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class ClientUpdate:
    """A client update on disk: ``path`` holds one fp32 delta per trained tensor, which counts ``scale`` times."""

    client: int
    num_examples: int
    path: Path
    holdout_metrics: HoldoutMetrics | None = None
    trained_metrics: HoldoutMetrics | None = None
    scale: float = 1.0

    def list_tensor_names(self) -> set[str]:
        """Of the tensors it holds; what is asked beside the deltas is among them."""
        with safe_open(self.path, "pt") as file:
            return set(file.keys())

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a delta, read from disk; a delta without dimensions counts as one row."""
        with safe_open(self.path, "pt") as file:
            rows = rows_of(file, name, start, stop)
        return rows if self.scale == 1.0 else rows * self.scale

    def read_tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Whole tensors, for those that are small."""
        with safe_open(self.path, "pt") as file:
            return {name: file.get_tensor(name) for name in names}


def iter_row_chunks(shape: Shape, together: int = 1) -> Iterator[tuple[int, int]]:
    """Row ranges of a few hundred thousand elements that cover a tensor; without dimensions it is one row.

    Where pieces of several models are held ``together``, each is as much smaller.
    """
    height, *width = shape or (1,)
    step = max(1, _PIECE // max(1, math.prod(width) * together))
    for start in range(0, height, step):
        yield start, min(start + step, height)


def rows_of(file: Any, name: str, start: int, stop: int) -> Tensor:
    """Rows ``start`` to ``stop`` of a tensor in an open safetensors file; one without dimensions counts as one row."""
    piece = file.get_slice(name)
    rows: Tensor = piece[start:stop] if piece.get_shape() else file.get_tensor(name)
    return rows


def decode_tensors(payload: bytes) -> dict[str, Tensor]:
    """The tensors of a payload; ClientUpdateError when it is not safetensors, a pickle for instance."""
    try:
        return safetensors.torch.load(payload)
    except (SafetensorError, KeyError) as error:  # KeyError: a precision torch does not have
        raise ClientUpdateError(f"the payload is not safetensors ({error}); update the client") from error
