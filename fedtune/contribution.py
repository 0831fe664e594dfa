"""What a device sends back: one safetensors payload of deltas, checked, spooled to disk and read piece by piece."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedtune.errors import ContributionError
from fedtune.packing import pack

__all__ = [
    "Contribution",
    "Form",
    "Order",
    "OwnScore",
    "Pair",
    "Report",
    "Sent",
    "check",
    "pack",
    "pieces",
    "unpack",
]

Shape = tuple[int, ...]
_PIECE = 1 << 18
"""Elements of a tensor that are held at a time; larger blocks would stay in the allocator's heap after use."""


Sent = Literal["tensors", "one factor", "pairs", "pairs and base"]
"""What clients train: tensors that are merged one by one; one factor of low-rank pairs at a time, the other being
common, merged like tensors; both factors; these beside a shared base.
"""


class Pair(NamedTuple):
    """Names of two factors that mean something only together: a weight gains scale * left @ right, or its transpose.

    ``left`` is [d, r, ...] and ``right`` [r, k, ...], further dimensions being a convolution's; ``base`` is the weight
    itself where it belongs to the shared state.
    """

    left: str
    right: str
    scale: float
    base: str | None = None
    transposed: bool = False


class Form(NamedTuple):
    """What a further tensor of a contribution must look like; integers lie in 0 .. below - 1 and may have a sum."""

    shape: Shape
    dtype: str = "F32"
    below: int = 0
    total: int | None = None


@dataclass(frozen=True)
class Order:
    """What the server asks of a client, beside the shared state: the recipe as JSON, the round, the client's number.

    ``run`` tells the client which tensors of its own to go on with.
    ``labels``, a JSON list, are the class names in the model's order: a device has none of the server's data.
    """

    recipe: str
    round: int
    client: int
    labels: str = "[]"
    run: str = ""


class OwnScore(NamedTuple):
    """A model on what a client held out: predictions, mean loss and accuracy; zeros when it held out nothing.

    ``more`` are the recipe's further metrics in its order.
    """

    predictions: int = 0
    loss: float = 0.0
    accuracy: float = 0.0
    more: tuple[float, ...] = ()


_NOTHING_HELD_OUT = OwnScore()


@dataclass(frozen=True)
class Report:
    """What a client says of its round, beside the deltas: work done, mean training loss, seconds and bytes.

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
    def trained(self) -> OwnScore:
        """The score of the model as the client trained it."""
        if not self.own_after:
            return OwnScore()
        loss, accuracy, *more = self.own_after
        return OwnScore(self.own_predictions, loss, accuracy, tuple(more))

    @property
    def own(self) -> OwnScore:
        """The three as one."""
        return OwnScore(self.own_predictions, self.own_loss, self.own_accuracy, tuple(self.own_more))


@dataclass(frozen=True)
class Contribution:
    """A spooled contribution: ``path`` holds one fp32 delta per trained tensor, which counts ``scale`` times."""

    client: int
    examples: int
    path: Path
    own: OwnScore = _NOTHING_HELD_OUT
    trained: OwnScore = _NOTHING_HELD_OUT
    scale: float = 1.0

    def names(self) -> set[str]:
        """Of the tensors it holds; what is asked beside the deltas is among them."""
        with safe_open(self.path, "pt") as file:
            return set(file.keys())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a delta, read from disk; a delta without dimensions counts as one row."""
        with safe_open(self.path, "pt") as file:
            rows = _rows(file, name, start, stop)
        return rows if self.scale == 1.0 else rows * self.scale

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Whole tensors, for those that are small."""
        with safe_open(self.path, "pt") as file:
            return {name: file.get_tensor(name) for name in names}


def pieces(shape: Shape, together: int = 1) -> Iterator[tuple[int, int]]:
    """Row ranges of a few hundred thousand elements that cover a tensor; without dimensions it is one row.

    Where pieces of several models are held ``together``, each is as much smaller.
    """
    height, *width = shape or (1,)
    step = max(1, _PIECE // max(1, math.prod(width) * together))
    for start in range(0, height, step):
        yield start, min(start + step, height)


def _rows(file: Any, name: str, start: int, stop: int) -> Tensor:
    piece = file.get_slice(name)
    rows: Tensor = piece[start:stop] if piece.get_shape() else file.get_tensor(name)
    return rows


def unpack(payload: bytes) -> dict[str, Tensor]:
    """The tensors of a payload; ContributionError when it is not safetensors, a pickle for instance."""
    try:
        return safetensors.torch.load(payload)
    except (SafetensorError, KeyError) as error:  # KeyError: a precision torch does not have
        raise ContributionError(f"the payload is not safetensors ({error}); update the client") from error


def check(
    path: Path,
    expected: Mapping[str, Shape],
    extras: Mapping[str, Form],
    max_norm: float | None,
    limit: str = "federation.max_norm",
) -> float:
    """The L2 norm over a spooled payload's deltas, read piece by piece; ``extras`` travel beside and do not count.

    ``limit`` is the recipe's key for ``max_norm``. Raises ContributionError when the payload is not safetensors or its
    names, shapes, values or norm do not hold.
    """
    try:
        with safe_open(path, "pt") as deltas:
            _check_names(set(deltas.keys()), expected.keys() | extras.keys())
            for name, form in extras.items():
                _check_extra(deltas, name, form)
            norm = math.sqrt(sum(_square(deltas, name, expected[name]) for name in sorted(expected)))
    except (SafetensorError, KeyError) as error:  # KeyError: a precision torch does not have
        raise ContributionError(f"the payload is not safetensors ({error}); update the client") from error
    if max_norm is not None and norm > max_norm:
        raise ContributionError(f"its norm {norm:.4g} is above {limit} {max_norm:.4g}")
    return norm


def _check_names(sent: Set[str], expected: Set[str]) -> None:
    missing, unknown = sorted(expected - sent), sorted(sent - expected)
    if missing or unknown:
        raise ContributionError(f"tensor names differ: missing {missing[:3]}, unknown {unknown[:3]}")


def _square(deltas: Any, name: str, shape: Shape) -> float:
    """The squared L2 norm of a delta that holds."""
    _check_form(deltas.get_slice(name), name, Form(shape))
    square = sum(
        float(torch.linalg.vector_norm(_rows(deltas, name, start, stop), dtype=torch.float64)) ** 2
        for start, stop in pieces(shape)
    )
    if not math.isfinite(square):
        raise ContributionError(f"{name} holds values that are not finite")
    return square


def _check_extra(file: Any, name: str, form: Form) -> None:
    _check_form(file.get_slice(name), name, form)
    tensor: Tensor = file.get_tensor(name)
    if not bool(tensor.isfinite().all()):
        raise ContributionError(f"{name} holds values that are not finite")
    if not tensor.is_floating_point() and any(not 0 <= number < form.below for number in _range(tensor)):
        raise ContributionError(f"{name} holds numbers outside 0 to {form.below - 1}")
    if form.total is not None and int(tensor.sum()) != form.total:
        raise ContributionError(f"{name} adds up to {int(tensor.sum())} in place of {form.total}")


def _range(tensor: Tensor) -> list[int]:
    """The least and the greatest number, where there is any."""
    return [int(tensor.min()), int(tensor.max())] if tensor.numel() else []


def _check_form(tensor: Any, name: str, form: Form) -> None:
    if tuple(tensor.get_shape()) != form.shape:
        raise ContributionError(f"{name} has shape {list(tensor.get_shape())} in place of {list(form.shape)}")
    if tensor.get_dtype() != form.dtype:
        raise ContributionError(f"{name} is {tensor.get_dtype()} in place of {form.dtype}")
