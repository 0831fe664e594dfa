"""Classifier only: the pretrained backbone is frozen and just the new head is trained (a linear probe).

What: the head behind the backbone follows the gradient; everything below runs without a graph.
Saves: all activations of the backbone; only the head's input is kept.
Sends: the head, a few kilobytes.
Use when: the pretrained features already separate the classes, or as the floor any other technique has to beat.
Avoid when: the task is far from what the backbone saw; and for language models, which bring no new head.
Source: Alain and Bengio, "Understanding intermediate layers using linear classifier probes" (arXiv 1610.01644).
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from fedtune.errors import ModelError
from fedtune.recipe import TaskName
from fedtune.techniques._technique import Technique, list_head_parameters, unfreeze_parameters

__all__ = ["HeadOnly"]


class HeadOnly(Technique):
    """Train the head alone."""

    name: ClassVar[str] = "head-only"
    conflicts_with: ClassVar[Mapping[str, str]] = {
        "bias": "the head is trained beside biases anyway",
        "full": "full trains the head among all the rest",
        "lora": "the head is trained beside a low-rank pair anyway",
        "qlora": "the head is trained beside a low-rank pair anyway",
    }

    def rewrite_model(self, model: nn.Module, task: TaskName, seed: int) -> None:
        """Switch on the head's gradients."""
        if task == "text-generation":
            raise ModelError("the technique head-only trains a new head, which text-generation has not")
        unfreeze_parameters(model, list_head_parameters(model))
