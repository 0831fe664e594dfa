"""Losses of models with a head, with the bits of transformers' functions."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["compute_causal_loss", "compute_class_loss"]


def compute_causal_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Return the mean cross-entropy of each token given those before it: logits [b, n, v], labels [b, n].

    ``num_items_in_batch`` divides the sum instead of the number of labels that count. ``shift_labels`` are those of
    the next tokens.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:].contiguous()
    flat, following = logits.float().view(-1, vocab_size), shift_labels.view(-1).to(logits.device)
    if num_items_in_batch is None:
        return F.cross_entropy(flat, following, ignore_index=ignore_index)
    total = F.cross_entropy(flat, following, ignore_index=ignore_index, reduction="sum")
    return total / torch.as_tensor(num_items_in_batch, device=total.device)


def compute_class_loss(logits: Tensor, labels: Tensor, problem: str | None) -> Tensor:
    """Return the mean loss of logits [n, classes] under labels of a ``problem_type``."""
    if problem == "regression":
        return F.mse_loss(logits.squeeze(), labels.squeeze())
    if problem == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels)
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))
