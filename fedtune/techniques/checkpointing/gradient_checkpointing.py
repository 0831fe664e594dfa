"""Gradient checkpointing: store only the input of each block and run the block again in the backward pass.

What: the forward pass of each transformer block is repeated when its gradient is computed. Gradients stay bit-equal.
Saves: all activations inside the blocks. The input of each block remains, and the activations of one block at a time.
Costs: one more forward pass, which takes about a third more time.
Sends: what the other technique sends.
Use when: activations, not weights, fill the device's memory, for example with long texts or large batches.
Avoid when: the step fits and time is short, or the layers after the blocks need most memory (the head of a large
vocabulary).
Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174), section 3.
"""

from typing import Any, ClassVar

from torch import nn

from fedtune.errors import ModelError
from fedtune.models.blocks.block_model import BlockModel
from fedtune.models.classifier import ImageClassifier
from fedtune.models.recomputation import recompute_in_backward
from fedtune.tasks import Task
from fedtune.techniques._technique import Technique

__all__ = ["GradientCheckpointing"]


class GradientCheckpointing(Technique):
    """Recompute blocks in the backward pass."""

    name: ClassVar[str] = "gradient-checkpointing"
    fits_plain_blocks: ClassVar[bool] = True
    paged_base_problem: ClassVar[str | None] = None
    selects_trainable_tensors: ClassVar[bool] = False
    allows_kv_cache: ClassVar[bool] = True

    def rewrite_model(self, model: nn.Module, task: Task, seed: int) -> None:
        """Enable the model's own non-reentrant checkpointing."""
        if isinstance(model, ImageClassifier | BlockModel) and model.supports_gradient_checkpointing:
            model.enable_checkpointing(recompute_in_backward)
            return
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise ModelError(f"{type(model).__name__} has no blocks to checkpoint; remove the technique")
        able: Any = model
        able.activation_checkpointing_enable({"use_reentrant": False})
        if hasattr(model, "disable_input_require_grads"):
            able.disable_input_require_grads()  # only reentrant checkpointing needs inputs that require gradients

    def make_reference(self) -> None:
        """Return the technique without checkpointing, which has the same gradients."""
