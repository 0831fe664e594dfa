"""Selective recomputation: blocks keep the results of their matrix products and make the cheap rest a second time.

What: linear layers' outputs and the fused attention kernel's are kept; norms, activation functions, element-wise
products, dropout and position factors run again in the backward pass, as do products over few terms (low-rank factors)
and the unfused attention core with its scores, tokens x tokens a head. Gradients stay the same to the bit.
Saves: what those cheap operations keep. Costs: next to no products, so most of the time that ``checkpointing`` costs.
Sends: what the technique beside it sends.
Use when: the step almost fits, and time matters; most is gained where attention is unfused, as dropout inside it makes
it on a processor, or where all weights are trained.
Avoid when: it is far from fitting (``checkpointing`` and ``meft`` keep far less); or weights are frozen, attention is
fused and the activation function is a plain one, as in a ViT with ``lora``: an ordinary step then keeps fewer bytes
than all products come to, since some of them no gradient needs.
Fits: transformers models with checkpointing of their own; convolutions inside blocks are made again.
Source: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198), section
5, which recomputes the attention core. Deviation: a fused attention core keeps nothing quadratic and is left alone;
what is recomputed in its place are the operations around the products.
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
from fedtune.recipe import TaskName
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
    """Keep products, recompute what lies between them."""

    name: ClassVar[str] = "selective-recompute"
    selects_trainable_tensors: ClassVar[bool] = False
    conflicts_with: ClassVar[Mapping[str, str]] = {
        "checkpointing": "both decide what the same blocks keep",
        "meft": "reversible blocks store no activations that could be recomputed",
    }

    max_recomputed_inner_dim: int = Field(
        64, ge=0, description="products that sum at most so many terms are recomputed"
    )

    def rewrite_model(self, model: nn.Module, task: TaskName, seed: int) -> None:
        """Switch on transformers' non-reentrant checkpointing with a choice of what is kept."""
        if not isinstance(model, PreTrainedModel) or not model.supports_gradient_checkpointing:
            raise ModelError(f"{type(model).__name__} has no blocks to recompute; leave selective-recompute out")
        contexts = partial(create_selective_checkpoint_contexts, partial(_policy, terms=self.max_recomputed_inner_dim))
        model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": contexts, **_HOOKS})
        model.disable_input_require_grads()  # only reentrant checkpointing needs inputs that require gradients

    def make_reference(self) -> None:
        """Stored activations give the same gradients."""


def _policy(_: Any, operation: Any, *args: Any, terms: int, **__: Any) -> CheckpointPolicy:
    """Keep what costs more to make again than its bytes are worth: 2 x terms operations for each number."""
    name = operation.name()
    kept = name in _CORES or (name in _LEFT and args[_LEFT[name]].shape[-1] > terms)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
