"""TinyTL: train a small branch beside every block of a frozen mobile net, and the biases.

What: each inverted residual block gets a lite residual branch (pool, grouped convolution, norm, ReLU, 1 x 1
convolution, norm) at half the resolution. The last scale of a branch starts at 0, so training starts at the pretrained
function. The shifts of all norms are trained unless ``train_biases`` is off. A classifier's new head is trained too.
Saves: the activations of the main path. Frozen convolutions and norms store nothing; ReLU and ReLU6 store one bit per
element. The branches store maps of the narrow ends of their block at a quarter of the pixels.
Sends: the branches, one number per channel, and the head.
Exactness: gradients are bit-equal to those of plain layers. Hard-swish and other functions store their input.
Use when: a whole mobile net, including its first blocks, should adapt with little memory.
Avoid when: the result must be a plain net: the branches stay, and no export format supports them. Also avoid it if
training a few top blocks is enough (``mobiletl``).
Source: Cai, Gan, Zhu and Han, "TinyTL: Reduce Memory, Not Parameters for Efficient On-Device Learning" (arXiv
2007.11622), section 3.2, TinyTL-L+B; without ``train_biases``, TinyTL-L. The branch is that of the released code.
Deviations: the net keeps its frozen batch norms; the paper replaces them by group norms with standardised weights. The
branches have group norms of eight channels. Frozen weights stay in fp32. Features have one resolution.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from fedtune.errors import ModelError
from fedtune.tasks import Task
from fedtune.techniques._layers.efficient_layers import make_model_efficient
from fedtune.techniques._technique import Technique, list_head_parameters, unfreeze_parameters
from fedtune.techniques.mobile._inverted_residual import InvertedResidualLayers, find_inverted_residuals
from fedtune.techniques.mobile._lite_residual import LiteResidual, attach_lite_residual

__all__ = ["Tinytl"]


class Tinytl(Technique):
    """Train lite residuals, biases and a classifier's head."""

    name: ClassVar[str] = "tinytl"
    conflicts_with: ClassVar[Mapping[str, str]] = {
        "bias": "tinytl trains biases itself",
        "head-only": "the head is already trained with the branches",
        "dynamic-pruning": "all weights are trained under masks",
        "full": "full trains the blocks that tinytl freezes",
        "lora": "low-rank pairs hide the convolutions that identify blocks",
        "batch-norm": "tinytl freezes the scales of norms",
        "qlora": "low-rank pairs hide the convolutions that identify blocks",
    }

    train_biases: bool = Field(True, description="train the shifts of all norms too")
    kernel_size: Literal[1, 3, 5, 7] = Field(5, description="kernel size of the branch's grouped convolution")
    groups: int = Field(2, ge=1, description="groups of that convolution")
    store_activations: bool = Field(False, description="ordinary autograd, for comparison")

    def rewrite_model(self, model: nn.Module, task: Task, seed: int) -> None:
        """Add branches, initialised from ``seed``, to the blocks; train them, the biases and the head."""
        found = find_inverted_residuals(model)
        if self.train_biases:
            unfreeze_parameters(model, [name for name, _ in model.named_parameters() if name.endswith("bias")])
        unfreeze_parameters(model, list_head_parameters(model))
        if not self.store_activations:
            make_model_efficient(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for block in found:
                attach_lite_residual(model.get_submodule(block.name), self._branch(model, block))

    def make_reference(self) -> "Tinytl":
        """Return the same network with stored activations."""
        return self.model_copy(update={"store_activations": True})

    def has_unchanged_base(self) -> bool:
        """Return False: the branches stay."""
        return False

    def _fold(self, model: nn.Module) -> None:
        """Refuse: no plain net computes this function."""
        raise ModelError(
            f"tinytl adds branches that a plain {type(model).__name__} does not have; evaluate the run instead"
        )

    def _branch(self, model: nn.Module, block: InvertedResidualLayers) -> LiteResidual:
        first: Any = model.get_submodule(block.convolutions[0])
        last: Any = model.get_submodule(block.convolutions[-1])
        return LiteResidual(first.in_channels, last.out_channels, self.kernel_size, self.groups).to(first.weight.dtype)
