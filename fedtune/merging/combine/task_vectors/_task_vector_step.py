"""The base classes of steps that sparsify each delta and add them up, with or without an election of signs.

The published names differ in how a delta is sparsified, whether signs are elected, and in their settings.

Low-rank pairs: if A is common to all models, sum_i c_i (B_i A) = (sum_i c_i B_i) A. A sum can therefore act on B alone,
and so can, on average, a sum of entries that are dropped at random and rescaled. Steps that elect signs or keep the
largest entries cannot: for any invertible M, the pairs (B_i M)(M^-1 A) have the same products, but other entries of
B_i M win. Such steps are refused for one factor.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedtune.merging._step import CombineStep, MergeInput, Shape
from fedtune.merging.combine._inner_products import flatten_rows
from fedtune.merging.combine._weighted_sums import choose_precision, sum_terms, sum_weighted
from fedtune.merging.combine._weights import Normalise, Scale
from fedtune.merging.combine.task_vectors._delta_cache import cache_small_deltas
from fedtune.merging.combine.task_vectors._magnitude_selection import Stream
from fedtune.wire.client_update import iter_row_chunks

__all__ = ["Density", "TaskVectorCombineStep", "Trimmed", "iter_delta_chunks", "sum_deltas", "sum_with_elected_sign"]

Density = Annotated[float, Field(gt=0, le=1)]
_MIN_DIVISOR = 1e-8
"""A divisor nearer to zero than this is not divided by."""
_FAINT = 1e-7
"""A sum of magnitudes below this is not stretched to another one."""
_CACHE_ENTRIES = 1 << 15
"""Entries whose half a dozen sums stay in a processor's cache."""


class TaskVectorCombineStep(CombineStep, ABC):
    """scale * the sum of sparsified deltas; with ``normalise`` divided by the sum of the weights that took part."""

    sparsifies: ClassVar[bool] = True
    elects_sign: ClassVar[bool]
    rereads: ClassVar[bool] = False
    """Whether deltas are read more than once; the deltas of a small tensor are then cached."""
    scale: Scale = 1.0
    normalise: Normalise = False

    @abstractmethod
    def iter_sparse_chunks(self, index: int, name: str, shape: Shape, merge_input: MergeInput) -> Iterator[Tensor]:
        """The sparsified delta of one tensor of model ``index``, in chunks [rows, width]."""

    def combine(self, name: str, shape: Shape, merge_inputs: Sequence[MergeInput]) -> Iterator[Tensor]:
        """The merged delta of each piece."""
        add = sum_with_elected_sign if self.elects_sign else sum_deltas
        weights = [merge_input.weight for merge_input in merge_inputs]
        merge_inputs = cache_small_deltas(name, shape, merge_inputs) if self.rereads else merge_inputs
        streams = [
            self.with_overrides(one).iter_sparse_chunks(index, name, shape, one)
            for index, one in enumerate(merge_inputs)
        ]
        for start, stop in iter_row_chunks(shape):
            total = add([next(stream) for stream in streams], weights, self.normalise).mul_(self.scale)
            yield total.float().reshape(stop - start, *shape[1:])


class Trimmed(TaskVectorCombineStep, ABC):
    """Keeps entries by magnitude; with ``rescale`` the sum of |x| stays the same."""

    selects_entries: ClassVar[bool] = True
    rereads: ClassVar[bool] = True
    rescale: bool = False

    @abstractmethod
    def select_entries(self, stream: Stream, size: int) -> Stream:
        """The stream of ``size`` entries with zeros for those that are not kept."""

    def iter_sparse_chunks(self, index: int, name: str, shape: Shape, merge_input: MergeInput) -> Iterator[Tensor]:
        """The kept entries, times the ratio of the sums of magnitudes before and after."""
        stream = partial(iter_delta_chunks, name, shape, merge_input)
        kept = self.select_entries(stream, math.prod(shape))
        ratio = (
            _compute_ratio(_sum_magnitudes(stream()), _sum_magnitudes(kept()))
            if self.rescale and kept is not stream
            else 1.0
        )
        return iter(kept()) if ratio == 1 else (piece.mul_(ratio) for piece in kept())


def _sum_magnitudes(stream: Iterable[Tensor]) -> float:
    """sum |x|."""
    return sum(float(piece.abs().sum(dtype=torch.float64)) for piece in stream)


def _compute_ratio(before: float, after: float) -> float:
    return before / after if min(before, after) >= _FAINT else 1.0


def iter_delta_chunks(name: str, shape: Shape, merge_input: MergeInput) -> Iterator[Tensor]:
    """One model's delta of a tensor, piece by piece, as matrices [rows, width]."""
    for start, stop in iter_row_chunks(shape):
        yield flatten_rows(merge_input.read_rows(name, start, stop))


def sum_deltas(parts: Sequence[Tensor], weights: Sequence[float], normalise: bool) -> Tensor:
    """sum_i w_i x_i, with ``normalise`` divided by sum_i w_i; ``choose_precision`` says in which precision."""
    total, divisor = sum_weighted(parts, weights), sum(weights)
    return total.div_(divisor) if normalise and abs(divisor) > _MIN_DIVISOR else total


def sum_with_elected_sign(parts: Sequence[Tensor], weights: Sequence[float], normalise: bool) -> Tensor:
    """The sum of the entries w_i x_i that have the sign of their whole sum, a tie being positive.

    With ``normalise`` divided by the sum of these entries' weights. ``choose_precision`` says in which precision. Votes
    w_i x_i are counted in double precision; with equal weights x_i are counted, so that ties stay ties.
    """
    whole = torch.empty(parts[0].shape, dtype=choose_precision(len(parts)))
    factor = 1.0
    if min(weights) == max(weights) > 0:
        factor, weights = 1.0 if normalise else weights[0], [1.0] * len(weights)
    rows = max(1, _CACHE_ENTRIES // max(1, parts[0].shape[1]))
    for found, *block in zip(whole.split(rows), *(part.split(rows) for part in parts), strict=True):
        torch.mul(_sum_elected(block, weights, normalise), factor, out=found)
    return whole


def _sum_elected(parts: Sequence[Tensor], weights: Sequence[float], normalise: bool) -> Tensor:
    """As ``sum_with_elected_sign``: with e = +1 or -1 for the sign that won, an entry counts where e w_i x_i > 0."""
    kind = choose_precision(len(parts))
    votes = kind if weights[0] == 1 and len(set(weights)) == 1 else torch.float64  # x_i alone lose nothing in fp32
    elected = sum_terms(zip(parts, weights, strict=True), votes).sign_().to(kind).add_(0.5).sign_()
    total, divisor = torch.zeros_like(elected), torch.zeros_like(elected)
    for part, weight in zip(parts, weights, strict=True):
        taken = (part * elected).mul_(math.copysign(1.0, weight)).clamp_min_(0)
        total.add_(taken, alpha=abs(weight))
        if normalise:
            divisor.add_(taken.sign_(), alpha=weight)
    total.mul_(elected)
    return total.div_(_replace_zeros(divisor, weights)) if normalise else total


def _replace_zeros(divisor: Tensor, weights: Sequence[float]) -> Tensor:
    """The divisor, itself changed, with something else where it is nothing; the dividend is zero where all count."""
    if min(weights) > _MIN_DIVISOR:
        return divisor.clamp_min_(min(weights))  # none is smaller but zero; a mask takes ten times as long
    return divisor.masked_fill_(divisor.abs() <= _MIN_DIVISOR, 1.0)
