"""A language model's loss over some of its tokens: a rule looks at the predictions and drops labels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtune.models.blocks.losses import compute_causal_loss

__all__ = [
    "FilteredLoss",
    "ProjectionFinder",
    "compute_error_norms",
    "filter_loss",
    "find_filtered_loss",
    "set_base_loss",
]

_IGNORED = -100
_TOTAL = "num_items_in_batch"
_ROWS = 128
"""Tokens whose logits are looked at together."""

Projection = Callable[[Tensor], Tensor]
ProjectionFinder = Callable[[Tensor], Projection | None]
"""Given what a model hands to its loss: how rows of it become logits; None if they are logits."""


def _are_logits(_: Tensor) -> None:
    """Return None."""


@dataclass
class FilteredLoss:
    """What transformers calls for the loss; ``choose_dropped`` is given the error norms [n] of the labels that count.

    The loss divides by the labels that are kept, but at least by ``least_share`` of all. It is that of ``base`` itself
    if nothing is dropped.
    """

    choose_dropped: Callable[[Tensor], Tensor]
    least_share: float
    base: Callable[..., Tensor] = compute_causal_loss
    find_projection: ProjectionFinder = _are_logits
    is_active: bool = False
    labels: Tensor | None = None
    """Those of the batch that runs next, for whoever counts dropped tokens while scoring."""

    def __call__(
        self, logits: Tensor, labels: Tensor, vocab_size: int, shift_labels: Tensor | None = None, **others: Any
    ) -> Tensor:
        """The loss of logits [..., tokens, v], or of the hidden states that a deferred head passes on."""
        if not self.is_active:
            return self.base(logits, labels, vocab_size, shift_labels=shift_labels, **others)
        following = F.pad(labels, (0, 1), value=_IGNORED)[..., 1:] if shift_labels is None else shift_labels
        kept = self._drop_labels(logits.detach(), following.to(logits.device), self.find_projection(logits))
        if torch.equal(kept, following):
            return self.base(logits, labels, vocab_size, shift_labels=shift_labels, **others)
        counted, left = (int((one != _IGNORED).sum()) for one in (following, kept))
        divisor, total = torch.tensor(max(left, self.least_share * counted), device=logits.device), others.get(_TOTAL)
        others[_TOTAL] = divisor if total is None else divisor * total / counted  # a part of a batch with ``total``
        return self.base(logits, labels, vocab_size, shift_labels=kept, **others)

    @torch.no_grad()
    def _drop_labels(self, passed: Tensor, labels: Tensor, projection: Projection | None) -> Tensor:
        flat = labels.flatten()
        counted = (flat != _IGNORED).nonzero()[:, 0]
        norms = compute_error_norms(passed.flatten(0, -2), flat, counted, projection)
        dropped = counted[self.choose_dropped(norms)]
        return flat.index_fill(0, dropped, _IGNORED).view_as(labels)


def compute_error_norms(rows: Tensor, labels: Tensor, counted: Tensor, projection: Projection | None) -> Tensor:
    """‖softmax(z) - onehot(y)‖ of the rows ``counted``, a few at a time.

    With p = softmax(z) its square is the sum of p² over the vocabulary, - 2 p_y + 1: no one-hot vector is made.
    """
    found = [torch.zeros(0, device=rows.device)]
    for chosen in counted.split(_ROWS):
        logits = rows[chosen] if projection is None else projection(rows[chosen])
        p = logits.float().softmax(-1)
        of_label = p.gather(1, labels[chosen, None])[:, 0]
        found.append((p.square().sum(1) - 2 * of_label + 1).clamp(min=0).sqrt())
    return torch.cat(found)


def filter_loss(model: Any, choose_dropped: Callable[[Tensor], Tensor], least_share: float) -> FilteredLoss:
    """Put a rule before the model's loss, whoever computes it."""
    find_projection = getattr(model.get_output_embeddings(), "find_projection", _are_logits)
    loss = FilteredLoss(choose_dropped, least_share, model.loss_function, find_projection)
    vars(model)["_loss_function"] = loss
    return loss


def find_filtered_loss(model: nn.Module) -> FilteredLoss | None:
    """The model's loss, if it is a filtered one."""
    loss = vars(model).get("_loss_function")
    return loss if isinstance(loss, FilteredLoss) else None


def set_base_loss(model: nn.Module, loss: Callable[..., Tensor], find_projection: ProjectionFinder) -> None:
    """Make ``loss`` the model's loss, beneath the filter if there is one."""
    if (filtered := find_filtered_loss(model)) is None:
        vars(model)["_loss_function"] = loss
    else:
        filtered.base, filtered.find_projection = loss, find_projection
