"""Full fine-tuning: train every parameter.

What: all weights and biases are trained. Batch-norm statistics stay those of the pretrained model.
Saves: nothing. It is the baseline for the other techniques.
Sends: every parameter, in both directions, every round.
Use when: the model is small or the device is large, and only quality matters.
Avoid when: memory or uplink is limited. A low-rank or bias-only technique comes close at a fraction of the cost.
Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data" (arXiv 1602.05629),
Algorithm 1, which averages whole models.
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from fedtune.tasks import Task
from fedtune.techniques._technique import Technique, unfreeze_parameters

__all__ = ["Full"]


class Full(Technique):
    """Train everything."""

    name: ClassVar[str] = "full"
    fits_zeroth_order: ClassVar[bool] = True
    fits_plain_blocks: ClassVar[bool] = True
    paged_base_problem: ClassVar[str | None] = "trains the weights of the base, which are in a file that is only read"
    allows_kv_cache: ClassVar[bool] = True
    conflicts_with: ClassVar[Mapping[str, str]] = {
        "bias": "full trains biases among all the rest",
        "head-only": "full trains the head among all the rest",
        "lora": "full trains the weights that lora freezes",
        "qlora": "full trains the weights that qlora freezes",
    }

    def rewrite_model(self, model: nn.Module, task: Task, seed: int) -> None:
        """Unfreeze every parameter."""
        unfreeze_parameters(model, [name for name, _ in model.named_parameters()])
