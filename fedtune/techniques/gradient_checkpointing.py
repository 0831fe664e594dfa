"""Gradient checkpointing: blocks keep their input only and run a second time in the backward pass.

What: each transformer block's forward pass is repeated when its gradient is due; gradients stay the same to the bit.
Saves: all activations inside the blocks; one block input each, and the activations of one block at a time, remain.
Costs: one more forward pass, about a third more time. Sends: what the technique beside it sends.
Use when: activations, not weights, fill the device: long texts, large batches.
Avoid when: time is short and the step fits; or what lies behind the blocks dominates (a large vocabulary's head).
Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174), section 3.
"""

from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel

from fedtune.errors import ModelError
from fedtune.recipe import TaskName
from fedtune.techniques._technique import Technique

__all__ = ["GradientCheckpointing"]


class GradientCheckpointing(Technique):
    """Recompute blocks in the backward pass."""

    name: ClassVar[str] = "gradient-checkpointing"
    selects_trainable_tensors: ClassVar[bool] = False

    def rewrite_model(self, model: nn.Module, task: TaskName, seed: int) -> None:
        """Switch on the model's own non-reentrant checkpointing."""
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise ModelError(f"{type(model).__name__} has no blocks to checkpoint; leave the technique out")
        able: Any = model
        able.activation_checkpointing_enable({"use_reentrant": False})
        if isinstance(model, PreTrainedModel):
            model.disable_input_require_grads()  # only reentrant checkpointing needs inputs that require gradients

    def make_reference(self) -> None:
        """Blocks that keep everything give the same gradients."""
