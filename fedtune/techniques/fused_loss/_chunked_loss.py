"""Cross-entropy from hidden states, chunk by chunk; the gradients are computed with the loss.

With p = softmax(W h + b) and y the label, the loss of a token is -log p_y and its gradient by the logits p - onehot(y).
Every term divides by the number of counted tokens, so each token's share of all gradients is known as soon as its
logits are, and neither logits nor probabilities need to wait for the backward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["fused_cross_entropy"]


def fused_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    chunk_size: int,
    ignore_index: int,
    num_items: Tensor | None,
) -> Tensor:
    """The summed loss of hidden states [n, h] under a head W [v, h], b [v], over the number of labels [n] that count.

    Labels equal to ``ignore_index`` do not count; if none counts, the loss and all gradients are 0. ``num_items``
    replaces the number. At most ``chunk_size`` rows of logits [chunk, v] exist at a time, in fp32 or fp64.
    """
    counted = (labels != ignore_index).nonzero()[:, 0]
    if not torch.is_grad_enabled():  # torch would ask for the gradients of a trained head all the same
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    loss: Tensor = _Fused.apply(
        hidden, weight, bias, labels, counted, num_items if num_items is not None else max(1, len(counted)), chunk_size
    )
    return loss


class _Fused(torch.autograd.Function):
    """Stores the gradients of the hidden states [n, h], and those of W and b if these are trained."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        counted: Tensor,
        divisor: Tensor | int,
        chunk: int,
    ) -> Tensor:
        fine = torch.promote_types(weight.dtype, torch.float32)
        by_hidden, by_weight, by_bias = _zeros(ctx.needs_input_grad, (hidden, weight, bias), fine)
        loss = torch.zeros((), dtype=fine, device=hidden.device)
        for rows in counted.split(chunk):
            h = hidden[rows]
            z = F.linear(h, weight, bias).to(fine)
            loss += _loss_and_gradient_in_place(z, labels[rows, None])
            z /= divisor
            if by_hidden is not None:
                by_hidden[rows] = (z.to(weight.dtype) @ weight).to(by_hidden.dtype)  # autocast gives another type
            if by_weight is not None:
                by_weight.addmm_(z.T, h.to(fine))
            if by_bias is not None:
                by_bias += z.sum(0)
            del z  # or two chunks' logits would exist while the next one's are made
        ctx.save_for_backward(by_hidden, _match_gradient(by_weight, weight), _match_gradient(by_bias, bias))
        return loss / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (*(_scale_gradient(gradient, upstream[0]) for gradient in ctx.saved_tensors), None, None, None, None)


def _loss_and_gradient_in_place(z: Tensor, label: Tensor) -> Tensor:
    """The summed loss of logits [rows, v], which turn into the gradient by them: no second tensor of their size."""
    z -= z.amax(1, keepdim=True)
    of_label = z.gather(1, label)
    total = z.exp_().sum(1, keepdim=True)
    z /= total
    z.scatter_add_(1, label, z.new_full(label.shape, -1.0))
    return (total.log() - of_label).sum()


def _zeros(
    needed: Sequence[bool], inputs: tuple[Tensor, Tensor, Tensor | None], fine: torch.dtype
) -> list[Tensor | None]:
    """Where gradients gather: rows of hidden states are written once, sums over tokens need the finer precision."""
    kinds = (inputs[0].dtype, fine, fine)
    return [
        torch.zeros_like(tensor, dtype=kind) if wanted and tensor is not None else None
        for wanted, tensor, kind in zip(needed, inputs, kinds, strict=False)
    ]


def _match_gradient(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if gradient is None or parameter is None else gradient.to(parameter.dtype)


def _scale_gradient(gradient: Tensor | None, upstream: Tensor) -> Tensor | None:
    """Does not copy the gradient for the usual factor of 1: it is as large as the output embeddings."""
    return gradient if gradient is None or upstream == 1 else gradient * upstream
