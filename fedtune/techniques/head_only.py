"""Classifier only: freeze the pretrained backbone and train just the new head (a linear probe).

What: only the head after the backbone is trained. The backbone runs without an autograd graph.
Saves: all activations of the backbone. Only the input of the head is stored.
Sends: the head, a few kilobytes.
Use when: the pretrained features already separate the classes, or as a baseline that other techniques must beat.
Avoid when: the task differs much from the pretraining data. Language models have no new head and are refused.
Source: Alain and Bengio, "Understanding intermediate layers using linear classifier probes" (arXiv 1610.01644).
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from fedtune.errors import ModelError
from fedtune.tasks import Task
from fedtune.techniques._technique import Technique, list_head_parameters, unfreeze_parameters

__all__ = ["HeadOnly"]


class HeadOnly(Technique):
    """Train the head alone."""

    name: ClassVar[str] = "head-only"
    fits_zeroth_order: ClassVar[bool] = True
    fits_plain_blocks: ClassVar[bool] = True
    paged_base_problem: ClassVar[str | None] = None
    allows_kv_cache: ClassVar[bool] = True
    conflicts_with: ClassVar[Mapping[str, str]] = {
        "bias": "the head is already trained with the biases",
        "full": "full trains the head among all the rest",
        "lora": "the head is already trained with the low-rank pairs",
        "qlora": "the head is already trained with the low-rank pairs",
    }

    def rewrite_model(self, model: nn.Module, task: Task, seed: int) -> None:
        """Unfreeze the head."""
        if not task.has_new_head:
            raise ModelError(f"head-only trains a new head, but {task.name} has none; choose another technique")
        unfreeze_parameters(model, list_head_parameters(model))
