"""Norms only: train the scale and shift of every batch norm, and the new head of a classifier.

What: two numbers per channel are trained. Statistics and convolutions stay those of the pretrained net.
Saves: the activations that convolutions and activation functions store. A frozen convolution stores nothing; ReLU and
ReLU6 store one bit per element. The PyTorch versions store their whole inputs, so with them this technique saves almost
nothing. The inputs of the norms remain, because the gradient of a scale needs them. They are about a third of the
activation memory of full fine-tuning.
Sends: two numbers per channel and the head.
Exactness: gradients are bit-equal to those of plain layers.
Use when: all of a convolutional net should adapt and the uplink is slow.
Avoid when: memory is limited. ``bias`` trains the shifts alone and stores no maps; ``mobiletl`` trains more for less
memory.
Source: Frankle, Schwab and Morcos, "Training BatchNorm and Only BatchNorm" (arXiv 2003.00152); as a baseline in Cai et
al., "TinyTL" (arXiv 2007.11622). Deviation: statistics stay frozen, and the head is trained too.
"""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import nn

from fedtune.errors import ModelError
from fedtune.tasks import Task
from fedtune.techniques._layers.efficient_layers import has_batch_norms, make_model_efficient
from fedtune.techniques._layers.layer_replacement import restore_plain_layers
from fedtune.techniques._technique import Technique, list_head_parameters, unfreeze_parameters

__all__ = ["BatchNorm"]


class BatchNorm(Technique):
    """Train batch norms and a classifier's head."""

    name: ClassVar[str] = "batch-norm"
    conflicts_with: ClassVar[Mapping[str, str]] = {
        "bias": "the shifts are already trained with the scales",
        "head-only": "the head is already trained with the norms",
        "dynamic-pruning": "all weights are trained under masks",
        "full": "full trains norms among all the rest",
    }

    store_activations: bool = Field(False, description="ordinary autograd, for comparison")

    def rewrite_model(self, model: nn.Module, task: Task, seed: int) -> None:
        """Unfreeze scales, shifts and the head."""
        if not has_batch_norms(model):
            raise ModelError(f"{type(model).__name__} has no batch norms to train; choose bias or lora")
        norms = [name for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)]
        inside = tuple(f"{norm}." for norm in norms)
        unfreeze_parameters(model, [name for name, _ in model.named_parameters() if name.startswith(inside)])
        unfreeze_parameters(model, list_head_parameters(model))
        if not self.store_activations:
            make_model_efficient(model)

    def make_reference(self) -> "BatchNorm":
        """Return the same network with stored activations."""
        return self.model_copy(update={"store_activations": True})

    def _fold(self, model: nn.Module) -> None:
        """Replace the special layers by plain ones with the same weights."""
        restore_plain_layers(model)
