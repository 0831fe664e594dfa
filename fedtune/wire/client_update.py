"""What a device sends back: one safetensors payload of deltas, checked, spooled to disk and read piece by piece."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
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
    """What a further tensor of a contribution must look like; integers lie in 0 .. below - 1 and may have a sum.

    Real numbers that are sums of sizes or counts are never ``negative``.
    """

    shape: Shape
    dtype: str = "F32"
    upper_bound: int = 0
    required_sum: int | None = None
    negative: bool = True


@dataclass(frozen=True)
class TrainRequest:
    """What the server asks of a client, beside the shared state: the recipe as JSON, the round, the client's number.

    ``run`` tells the client which tensors of its own to go on with.
    With ``scoring`` it only scores the state, which is that after the round.
    ``labels``, a JSON list, are the class names in the model's order: a device has none of the server's data.
    ``base`` is the digest of the base weights that the round begins with, where the server keeps track of them; the
    state holds them whole, unless ``held`` is the digest of those that the state's increments are to be added to.
    """

    recipe: str
    round: int
    client: int
    labels: str = "[]"
    run: str = ""
    scoring: bool = False
    base: str = ""
    held: str = ""


class HoldoutMetrics(NamedTuple):
    """A model on what a client held out: predictions, mean loss and accuracy; zeros when it held out nothing.

    ``more`` are the recipe's further metrics in its order.
    """

    num_predictions: int = 0
    loss: float = 0.0
    accuracy: float = 0.0
    more: tuple[float, ...] = ()


_NOTHING_HELD_OUT = HoldoutMetrics()


@dataclass(frozen=True)
class ClientReport:
    """What a client says of its round, beside the deltas: work done, mean training loss, seconds and bytes.

    ``loss`` is NaN where the client keeps it to itself.

    Three are the score of the model it received on what it held out. ``micro_batch`` is the most examples that went
    through the model at a time where its memory could not hold the whole batch; 0 where it could. ``own_more`` are the
    recipe's further metrics of that score; ``own_after`` is loss, accuracy and these of the model it trained, on the
    same examples; both are empty where nothing was held out.
    """

    examples: int
    loss: float
    seconds: float
    saved_bytes: int
    peak_rss: int
    own_predictions: int = 0
    own_loss: float = 0.0
    own_accuracy: float = 0.0
    micro_batch: int = 0
    own_more: Sequence[float] = ()
    own_after: Sequence[float] = ()

    @property
    def trained(self) -> HoldoutMetrics:
        """The score of the model as the client trained it."""
        if not self.own_after:
            return HoldoutMetrics()
        loss, accuracy, *more = self.own_after
        return HoldoutMetrics(self.own_predictions, loss, accuracy, tuple(more))

    @property
    def local_metrics(self) -> HoldoutMetrics:
        """The three as one."""
        return HoldoutMetrics(self.own_predictions, self.own_loss, self.own_accuracy, tuple(self.own_more))


@dataclass(frozen=True)
class ClientUpdate:
    """A spooled contribution: ``path`` holds one fp32 delta per trained tensor, which counts ``scale`` times."""

    client: int
    num_examples: int
    path: Path
    holdout_metrics: HoldoutMetrics = _NOTHING_HELD_OUT
    trained: HoldoutMetrics = _NOTHING_HELD_OUT
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
    """The tensors of a payload; ContributionError when it is not safetensors, a pickle for instance."""
    try:
        return safetensors.torch.load(payload)
    except (SafetensorError, KeyError) as error:  # KeyError: a precision torch does not have
        raise ClientUpdateError(f"the payload is not safetensors ({error}); update the client") from error
