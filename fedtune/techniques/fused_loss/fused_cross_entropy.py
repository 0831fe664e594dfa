"""Fused cross-entropy: compute a language model's loss in chunks, so that its logits never exist all at once.

What: in a training step, the output layer and the cross-entropy run together on ``chunk_size`` tokens at a time. The
gradient of each chunk is computed immediately. Scoring and generation use ordinary logits.
Saves: logits, probabilities and their gradient, each with tokens x vocabulary entries. For a small model with a
vocabulary of 49 thousand, these need more memory than all its blocks. What remains is the logits of one chunk, the
gradient of the hidden states and, if the output layer is trained, its gradient.
Exactness: loss and gradients equal those of the ordinary step up to the rounding of sums. Padding costs no matrix
product.
Sends: what the other technique sends.
Use when: you train a language model. With ``gradient-checkpointing`` or ``meft``, the head would otherwise set the peak
memory.
Avoid when: another technique needs the logits of a training step (distillation), or the vocabulary is tiny.
Fits: causal language models whose loss uses the result of the output layer unchanged. Others are refused, and so are
tasks with a loss of their own, such as ``preference``.
Source: Luo et al., "Mini-Sequence Transformer" (arXiv 2407.15892), the part on the output layer, which recomputes its
logits in the backward pass. Deviations: gradients are computed in the forward pass, which saves one product with the
vocabulary. No token is dropped if the chunk size does not divide the number of tokens. A batch without any valid label
has loss 0, not nan.
"""

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from fedtune.accelerator import find_device, fork_random_state
from fedtune.errors import ModelError
from fedtune.models.blocks.losses import compute_causal_loss
from fedtune.models.paging.paged_layers import PagedLinear
from fedtune.models.paging.streamed_loss import HeadRows, streamed_cross_entropy
from fedtune.tasks import Task
from fedtune.techniques._filtered_loss import set_base_loss
from fedtune.techniques._technique import Technique
from fedtune.techniques.fused_loss._chunked_loss import fused_cross_entropy

__all__ = ["DeferredHead", "FusedCrossEntropy"]


class FusedCrossEntropy(Technique):
    """Compute output layer and cross-entropy together, one chunk of tokens at a time."""

    name: ClassVar[str] = "fused-cross-entropy"
    fits_zeroth_order: ClassVar[bool] = True
    fits_plain_blocks: ClassVar[bool] = True
    paged_base_problem: ClassVar[str | None] = None
    selects_trainable_tensors: ClassVar[bool] = False
    replaces_loss: ClassVar[bool] = True
    allows_kv_cache: ClassVar[bool] = True

    chunk_size: int = Field(128, ge=1, description="tokens whose logits exist at the same time")

    def rewrite_model(self, model: nn.Module, task: Task, seed: int) -> None:
        """Move the output layer into the loss and test it on two tokens; ModelError if the model does not fit."""
        name, plain = _plain_head(model)
        if type(task).compute_loss is not Task.compute_loss:  # it asks the model for logits, not for the loss
            raise ModelError(
                f"{task.name} computes a loss of its own from all logits, so fused-cross-entropy would save nothing; "
                "remove it"
            )
        late = _make_deferred_head(plain, self.chunk_size)
        model.set_submodule(name, late)
        late.handles = (
            model.register_forward_pre_hook(_begin_forward, with_kwargs=True),
            model.register_forward_hook(_end_forward, always_call=True),
        )
        set_base_loss(model, partial(_loss, head=late), late.find_projection)
        _try_step(model)

    def make_reference(self) -> None:
        """Return the technique without fusing, which has the same gradients."""

    def _fold(self, model: nn.Module) -> None:
        """Restore the plain output layer."""
        for name, layer in list(model.named_modules()):
            if isinstance(layer, DeferredHead):
                layer.remove_hooks()
                model.set_submodule(name, layer.to_plain_layer())
        vars(model).pop("_loss_function", None)


class DeferredHead(nn.Module):
    """An output layer that passes the hidden states to the loss in a training step with labels."""

    handles: tuple[RemovableHandle, ...] = ()

    def __init__(self, plain: nn.Linear, chunk: int) -> None:
        super().__init__()
        self.weight, self.bias, self.chunk = plain.weight, plain.bias, chunk
        self.is_deferred = False
        self.hidden_states: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., v] of hidden states [..., h], or late in a step the hidden states themselves."""
        if not self.is_deferred:
            return F.linear(hidden, self.weight, self.bias)
        self.hidden_states = hidden
        return hidden

    def find_projection(self, passed: Tensor) -> Callable[[Tensor], Tensor] | None:
        """How rows become logits where ``passed`` are the hidden states of this step; None where they are logits."""
        return partial(F.linear, weight=self.weight, bias=self.bias) if passed is self.hidden_states else None

    def to_plain_layer(self) -> nn.Linear:
        """The layer it stands for, with the same parameters."""
        high, wide = self.weight.shape
        layer = nn.Linear(wide, high, bias=self.bias is not None, device="meta")
        layer.weight, layer.bias = self.weight, self.bias
        return layer

    def compute_loss(self, labels: Tensor, ignore_index: int, num_items: Tensor | None) -> Tensor:
        """The loss of the hidden states of this step, which are let go of."""
        hidden, self.hidden_states = self.hidden_states, None
        assert hidden is not None, "the head is deferred"
        return fused_cross_entropy(
            hidden.flatten(0, -2),
            self.weight,
            self.bias,
            labels,
            chunk_size=self.chunk,
            ignore_index=ignore_index,
            num_items=num_items,
        )

    def remove_hooks(self) -> None:
        """Remove the hooks from the model."""
        for handle in self.handles:
            handle.remove()


class PagedDeferredHead(DeferredHead):
    """An output layer in a store. Its loss reads it once, a few rows of the vocabulary at a time."""

    def __init__(self, plain: PagedLinear, chunk: int) -> None:
        super().__init__(plain, chunk)
        self.__dict__["paged"] = plain  # not as a child, whose parameters would have other names

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, or late in a step the hidden states themselves."""
        if not self.is_deferred:
            return self.to_plain_layer().forward(hidden)
        return super().forward(hidden)

    def find_projection(self, passed: Tensor) -> Callable[[Tensor], Tensor] | None:
        """How rows become logits where ``passed`` are the hidden states of this step; None where they are logits."""
        return self.to_plain_layer() if passed is self.hidden_states else None

    def to_plain_layer(self) -> PagedLinear:
        """The paged layer."""
        layer: PagedLinear = self.__dict__["paged"]
        return layer

    def compute_loss(self, labels: Tensor, ignore_index: int, num_items: Tensor | None) -> Tensor:
        """The loss of the hidden states of this step, which are let go of."""
        hidden, self.hidden_states = self.hidden_states, None
        assert hidden is not None, "the head is deferred"
        return streamed_cross_entropy(
            hidden.flatten(0, -2),
            HeadRows(self.to_plain_layer().matrix, self.bias),
            labels,
            ignore_index=ignore_index,
            num_items=num_items,
        )


def _make_deferred_head(plain: nn.Linear, chunk: int) -> DeferredHead:
    return PagedDeferredHead(plain, chunk) if isinstance(plain, PagedLinear) else DeferredHead(plain, chunk)


def _plain_head(model: nn.Module) -> tuple[str, nn.Linear]:
    """Name and layer of a causal language model's output embeddings."""
    able: Any = model
    head = able.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise ModelError(
            f"{type(model).__name__} has no head over a vocabulary; remove the technique fused-cross-entropy"
        )
    if type(head) not in (nn.Linear, PagedLinear):
        raise ModelError(
            f"the head of {type(model).__name__} is a {type(head).__name__}; fused-cross-entropy needs a plain one"
        )
    return next(name for name, layer in model.named_modules() if layer is head), head


def _try_step(model: nn.Module) -> None:
    """A step on two tokens meets whatever the model does between its head and its loss."""
    device = find_device(model)
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    mode = model.training
    try:
        with torch.no_grad(), fork_random_state(device):
            model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    except (IndexError, RuntimeError, ValueError) as error:  # a loss of its own chokes on hidden states
        raise _misfit(model) from error
    finally:
        model.train(mode)


def _begin_forward(model: Any, _: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Before the model's forward pass: is this a training step whose loss is asked for?"""
    head = model.get_output_embeddings()
    head.is_deferred = model.training and kwargs.get("labels") is not None


def _end_forward(model: Any, _: tuple[Any, ...], output: Any) -> Any:
    """After it: hidden states are not handed out under the name of logits."""
    head = model.get_output_embeddings()
    late, passed = head.is_deferred, head.hidden_states
    head.is_deferred, head.hidden_states = False, None
    if output is not None and passed is not None:
        raise _misfit(model)
    return replace(output, logits=None) if late and is_dataclass(output) else None  # type: ignore[type-var]


def _loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    *,
    head: DeferredHead,
    **others: Any,
) -> Tensor:
    """What transformers calls for the loss of a causal language model; late, it is given the hidden states."""
    if logits is not head.hidden_states:
        return compute_causal_loss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **others)
    following = F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
    return head.compute_loss(following.flatten(), ignore_index, num_items_in_batch)


def _misfit(model: nn.Module) -> ModelError:
    return ModelError(
        f"{type(model).__name__} uses its logits for more than their cross-entropy; "
        "remove the technique fused-cross-entropy"
    )
