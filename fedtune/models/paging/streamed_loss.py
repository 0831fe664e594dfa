"""Cross-entropy under a head of a store, which is read once: a few rows of the vocabulary at a time.

With logits z = h W^T + b the gradient of a token's loss by h is softmax(z) W - W_y: attention whose keys and values are
the rows of W. As in flash attention (Dao et al., arXiv 2205.14135, algorithm 1) a running maximum m, the sum s of
exp(z - m) and the sum a of exp(z - m) W are rescaled whenever a chunk raises m. Then the loss is m + ln s - z_y and its
gradient a / s - W_y.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fedtune.models.paging.paged_matrix import PagedMatrix

__all__ = ["CHUNK_ROWS", "HeadRows", "streamed_cross_entropy"]

CHUNK_ROWS = 1024
"""Rows of the head that exist at a time."""


class HeadRows(NamedTuple):
    """W [v, h] in a store, and a frozen b [v] if there is one."""

    matrix: PagedMatrix
    bias: Tensor | None


def streamed_cross_entropy(
    hidden: Tensor,
    head: HeadRows,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    num_items: Tensor | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """The summed loss of hidden states [n, h] under a head, over the number of labels that count.

    Labels equal to ``ignore_index`` do not count; if none counts, the loss and its gradient are 0. ``num_items``
    replaces the number.
    """
    counted = (labels != ignore_index).nonzero()[:, 0]
    divisor = num_items if num_items is not None else max(1, len(counted))
    loss: Tensor = _Streamed.apply(hidden, *head, labels, counted, divisor, chunk_rows)
    return loss


class _Running(NamedTuple):
    """m [n, 1], s [n, 1] and a [n, h]; z_y [n, 1] and W_y [n, h] once the chunk with y was read."""

    highest: Tensor
    total: Tensor
    weighted: Tensor
    of_label: Tensor
    label_rows: Tensor


class _Streamed(torch.autograd.Function):
    """Keeps the gradient of the hidden states alone."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        matrix: PagedMatrix,
        bias: Tensor | None,
        labels: Tensor,
        counted: Tensor,
        divisor: Tensor | int,
        chunk_rows: int,
    ) -> Tensor:
        fine = torch.promote_types(hidden.dtype, torch.float32)
        chosen, label = hidden[counted].to(fine), labels[counted, None]
        if len(label) and not 0 <= int(label.min()) <= int(label.max()) < matrix.rows:
            raise IndexError(f"a label is out of range: the head {matrix.name} has {matrix.rows} rows")
        running = _begin(chosen)
        matrix.reader.prefetch_bytes(matrix.offset, matrix.nbytes)
        for start in range(0, matrix.rows, chunk_rows) if len(counted) else ():
            rows = matrix.read_rows(start, min(start + chunk_rows, matrix.rows)).to(fine)
            of_chunk = None if bias is None else bias[start : start + len(rows)].to(fine)
            _add_chunk(running, chosen, rows, of_chunk, label - start)
        gradient = torch.zeros_like(hidden)
        gradient[counted] = ((running.weighted / running.total - running.label_rows) / divisor).to(hidden.dtype)
        ctx.save_for_backward(gradient)
        return (running.highest + running.total.log() - running.of_label).sum() / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        [gradient] = ctx.saved_tensors
        scaled = gradient if upstream[0] == 1 else gradient * upstream[0]
        return (scaled, *[None] * 6)


def _begin(hidden: Tensor) -> _Running:
    column, rows = hidden.new_zeros(len(hidden), 1), torch.zeros_like(hidden)
    return _Running(column - torch.inf, column.clone(), rows, column.clone(), rows.clone())


def _add_chunk(running: _Running, hidden: Tensor, rows: Tensor, bias: Tensor | None, label: Tensor) -> None:
    """Add rows [c, h] of the head in place. ``label`` [n, 1] counts from the first of them."""
    z = F.linear(hidden, rows, bias)
    inside = ((label >= 0) & (label < len(rows)))[:, 0].nonzero()[:, 0]
    running.of_label[inside] = z[inside].gather(1, label[inside])
    running.label_rows[inside] = rows[label[inside, 0]]
    highest = torch.maximum(running.highest, z.amax(1, keepdim=True))
    rescale = (running.highest - highest).exp_()
    running.highest.copy_(highest)
    z.sub_(highest).exp_()
    running.total.mul_(rescale).add_(z.sum(1, keepdim=True))
    running.weighted.mul_(rescale).addmm_(z, rows)
