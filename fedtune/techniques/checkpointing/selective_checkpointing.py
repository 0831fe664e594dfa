"""Selective recomputation: blocks store the results of their matrix products and recompute the cheap operations.

What: the outputs of linear layers and of the fused attention kernel are stored. The backward pass recomputes norms,
activation functions, element-wise products, dropout and position factors. It also recomputes products with a small
inner dimension (low-rank factors) and the unfused attention core with its scores, tokens x tokens per head. Gradients
stay bit-equal.
Saves: the activations that those cheap operations store.
Costs: almost no matrix products are repeated, so most of the extra time of ``gradient-checkpointing`` is avoided.
Sends: what the other technique sends.
Use when: the step almost fits and time matters. It saves most if attention is unfused, which dropout inside attention
causes on a processor, or if all weights are trained.
Avoid when: the step is far from fitting (``gradient-checkpointing`` and ``meft`` store far less). Also avoid it if
weights are frozen, attention is fused and the activation function is a plain one, as in a ViT with ``lora``. An
ordinary step then stores less than the outputs of all products, because no gradient needs some of them.
Fits: transformers models that support gradient checkpointing. Convolutions inside blocks are recomputed.
Source: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198), section
5, which recomputes the attention core. Deviation: a fused attention core stores nothing quadratic and is not
recomputed. The operations around the products are recomputed instead.
"""

from collections.abc import Mapping
from functools import partial
from inspect import signature
from typing import Any, ClassVar

from pydantic import Field
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from fedtune.errors import ModelError
from fedtune.tasks import Task
from fedtune.techniques._technique import Technique

__all__ = ["SelectiveCheckpointing"]

_LEFT = {"aten::mm": 0, "aten::addmm": 1, "bitsandbytes::gemm_4bit": 0}
"""Products of linear layers, and which of their arguments is the left factor [..., terms]."""

_CORES = {
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
}
"""Attention in one kernel, which returns its output and the logarithms of its sums."""

_RESPECT = "respect_saved_tensors_hooks"
_HOOKS = {_RESPECT: False} if _RESPECT in signature(checkpoint).parameters else {}
"""What is kept passes others' hooks by, as in every torch before 2.14, which warns that its default will change."""


class SelectiveCheckpointing(Technique):
    """Store matrix products and recompute the operations between them."""

    name: ClassVar[str] = "selective-checkpointing"
    paged_base_problem: ClassVar[str | None] = None
    selects_trainable_tensors: ClassVar[bool] = False
    allows_kv_cache: ClassVar[bool] = True
    conflicts_with: ClassVar[Mapping[str, str]] = {
        "gradient-checkpointing": "both decide which activations the same blocks store",
        "meft": "reversible blocks store no activations that could be recomputed",
    }

    max_recomputed_inner_dim: int = Field(
        64, ge=0, description="products with at most this inner dimension are recomputed"
    )

    def rewrite_model(self, model: nn.Module, task: Task, seed: int) -> None:
        """Enable transformers' non-reentrant checkpointing with a policy of what is stored."""
        if not isinstance(model, PreTrainedModel) or not model.supports_gradient_checkpointing:
            raise ModelError(f"{type(model).__name__} has no blocks to recompute; remove selective-checkpointing")
        contexts = partial(create_selective_checkpoint_contexts, partial(_policy, terms=self.max_recomputed_inner_dim))
        model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": contexts, **_HOOKS})
        model.disable_input_require_grads()  # only reentrant checkpointing needs inputs that require gradients

    def make_reference(self) -> None:
        """Return the technique with stored activations, which has the same gradients."""


def _policy(_: Any, operation: Any, *args: Any, terms: int, **__: Any) -> CheckpointPolicy:
    """Keep what costs more to make again than its bytes are worth: 2 x terms operations for each number."""
    name = operation.name()
    kept = name in _CORES or (name in _LEFT and args[_LEFT[name]].shape[-1] > terms)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
