"""BitFit: only bias terms, and the new head of a classifier, are trained.

What: every parameter named ``bias``, among them the shifts of normalisation layers.
Saves: the inputs of all linear layers, which only weight gradients need; what non-linear functions keep, stays.
Sends: one number per output channel, about 0.1 % of an encoder.
Use when: uplink is the bottleneck and the model has biases (BERT, RoBERTa, GPT-2, OPT, ViT).
Avoid when: the model has none to speak of (Llama and its kin); it is refused where there is not one.
Source: Ben Zaken, Ravfogel and Goldberg, "BitFit" (arXiv 2106.10199), section 3.
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from fedtune.recipe import Task
from fedtune.techniques._technique import Technique, head_names, require

__all__ = ["Bias"]


class Bias(Technique):
    """Train bias terms and a classifier's head."""

    name: ClassVar[str] = "bias"
    excludes: ClassVar[Mapping[str, str]] = {
        "classifier": "the head is trained beside biases anyway",
        "full": "full trains biases among all the rest",
    }

    def apply(self, model: nn.Module, task: Task, seed: int) -> None:
        """Switch on the gradients of biases, then of the head."""
        require(model, [name for name, _ in model.named_parameters() if name.endswith("bias")])
        if task != "causal-language-modelling":
            require(model, head_names(model))
