"""Error Norm Truncation: drop the loss of tokens that contradict the model with certainty.

What: the error norm of a token is the distance of the predicted distribution from its label, e = ‖p - onehot(y)‖. It
lies between 0 and √2. A token with many likely alternatives has e near 1 and is kept. A token where the model is sure
of something else has e near √2 and is likely noise. With ``threshold``, tokens with a larger e are dropped; with
``fraction``, that share of a batch with the largest e. Nothing is dropped before ``start``, a share of the run, as a
model that does not know the data yet has no opinion worth following.
Exactness: the gradient of a dropped token is 0, and the choice itself has no gradient. The loss divides by the kept
tokens, but at least by half of all, so that a batch of mostly noise takes a smaller step. If no token is dropped, the
loss is the ordinary one, bit for bit. In micro-batches, each part divides by its own tokens.
Saves: nothing.
Costs: a second look at the logits, 128 tokens at a time. With ``fused-cross-entropy`` this is a second product with the
vocabulary.
Sends: what the other technique sends.
Logs: with ``threshold``, ``error_norm_share``: the share of held-out tokens that it would drop. A rise means that the
data drifts or is poisoned.
Use when: texts are scraped, translated by machine or labelled carelessly. Below about 20 % noise the gain is small.
Avoid when: a new task has just begun, since a new domain looks like noise; raise ``threshold`` or ``start``. Clients
with few examples should not use ``fraction``, which drops good tokens where there is no noise.
Fits: causal language models with a loss for each token.
Source: Li et al., "Error Norm Truncation" (arXiv 2310.00840). Deviations: e is computed as √(sum p² - 2 p_y + 1)
without a one-hot vector; ``fraction`` is taken within a batch, not from a stream of quantiles; the divisor.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fedtune.accelerator import find_device, fork_random_state
from fedtune.errors import ModelError
from fedtune.tasks import Task
from fedtune.techniques._filtered_loss import FilteredLoss, compute_error_norms, filter_loss, find_filtered_loss
from fedtune.techniques._technique import Technique

__all__ = ["ErrorNormTruncation"]

_LEAST_SHARE = 0.5


class ErrorNormTruncation(Technique):
    """Drop tokens whose prediction is confidently something else."""

    name: ClassVar[str] = "error-norm-truncation"
    fits_plain_blocks: ClassVar[bool] = True
    paged_base_problem: ClassVar[str | None] = None
    has_exact_gradients: ClassVar[bool] = False
    selects_trainable_tensors: ClassVar[bool] = False
    replaces_loss: ClassVar[bool] = True
    allows_kv_cache: ClassVar[bool] = True

    threshold: float = Field(1.35, gt=0, description="tokens with a larger error norm are dropped; √2 is the largest")
    fraction: float | None = Field(None, gt=0, lt=1, description="instead: the share of a batch's tokens to drop")
    start: float = Field(0.1, ge=0, lt=1, description="share of the run before which nothing is dropped")

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.fraction is not None and "threshold" in self.model_fields_set:
            raise ValueError("threshold and fraction are two rules for the same tokens; give one of them")
        return self

    def rewrite_model(self, model: nn.Module, task: Task, seed: int) -> None:
        """Put the rule before the model's loss; ModelError for a model that computes its loss otherwise."""
        if not hasattr(model, "get_output_embeddings") or task.auto_class != "AutoModelForCausalLM":
            raise ModelError(f"{type(model).__name__} is no causal language model; remove error-norm-truncation")
        if type(task).compute_loss is not Task.compute_loss:
            raise ModelError(f"{task.name} has a loss of its own, not one for each token; remove error-norm-truncation")
        _require_use(model, filter_loss(model, self.choose_dropped, _LEAST_SHARE))

    def begin_step(self, model: nn.Module, batch: Mapping[str, Tensor], progress: float) -> None:
        """Drop tokens from ``start`` on."""
        if (loss := find_filtered_loss(model)) is not None:
            loss.is_active, loss.labels = progress >= self.start, batch.get("labels")

    def choose_dropped(self, norms: Tensor) -> Tensor:
        """Places of the error norms [n] whose tokens are dropped."""
        if self.fraction is None:
            return (norms > self.threshold).nonzero()[:, 0]
        return norms.topk(int(self.fraction * len(norms))).indices

    @contextmanager
    def collect_metrics(self, model: nn.Module) -> Iterator[Callable[[], dict[str, float]]]:
        """Count held-out tokens above the threshold."""
        loss = find_filtered_loss(model)
        if loss is None or self.fraction is not None:
            yield dict
            return
        counts = [0, 0]
        handle = model.register_forward_hook(partial(_count, loss, counts))
        try:
            yield lambda: {"error_norm_share": counts[0] / max(1, counts[1])}
        finally:
            handle.remove()

    def _fold(self, model: nn.Module) -> None:
        """Restore the plain loss."""
        vars(model).pop("_loss_function", None)


@torch.no_grad()
def _require_use(model: nn.Module, loss: FilteredLoss) -> None:
    """ModelError unless a step on two tokens asks for this loss."""
    asked: list[Any] = []
    training, base = model.training, loss.base
    loss.base = lambda *given, **named: asked.append(given) or base(*given, **named)  # type: ignore[func-returns-value]
    device = find_device(model)
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    try:  # in training mode, as a base of four bits is rearranged by its first step in evaluation mode
        with fork_random_state(device):
            model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    finally:
        loss.base = base
        model.train(training)
    if not asked:
        raise ModelError(f"{type(model).__name__} computes its loss by itself; remove error-norm-truncation")


def _count(loss: FilteredLoss, counts: list[int], _: nn.Module, __: Any, output: Any) -> None:
    """Add the dropped and all predicted tokens of a scored batch."""
    if loss.labels is None or loss.labels.shape != output.logits.shape[:-1]:
        return
    labels = loss.labels[:, 1:].flatten().to(output.logits.device)
    counted = (labels != -100).nonzero()[:, 0]
    norms = compute_error_norms(output.logits[:, :-1].flatten(0, 1), labels, counted, None)
    counts[0] += len(loss.choose_dropped(norms))
    counts[1] += len(norms)
