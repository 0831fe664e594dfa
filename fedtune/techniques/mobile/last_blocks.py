"""Last blocks: train the top of a mobile net with ordinary PyTorch layers and freeze everything below.

What: trains the last ``num_blocks`` inverted residual blocks with their norms, the convolution after them, and a
classifier's new head. ``norm_statistics`` selects whether the statistics of the norms are trained, and
``head_convolution`` whether that convolution is.
Saves: the activations of the frozen blocks, which run without an autograd graph. With ``micro_batch_size`` they process
a few examples at a time, which lowers the peak. The trained blocks store all their activations.
Sends: the weights and statistics of those blocks.
Use when: you need a baseline for ``mobiletl``, which trains nearly the same for a third of the memory. Also use it when
the activations are neither ReLU nor ReLU6 and gradients must be exact.
Avoid when: memory is limited.
Source: Chiang et al., "MobileTL" (AAAI 2023), who compare with this method; Yosinski et al., "How transferable are
features in deep neural networks?" (arXiv 1411.1792), section 4, who retrain upper layers. Reconstructed: the statistics
of all trained norms follow the data.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from fedtune.tasks import Task
from fedtune.techniques._layers.efficient_layers import unfreeze_batch_norm
from fedtune.techniques._layers.layer_replacement import replace_layer, restore_plain_layers
from fedtune.techniques._technique import Technique, list_head_parameters, unfreeze_parameters
from fedtune.techniques.mobile._frozen_prefix import run_frozen_prefix
from fedtune.techniques.mobile._inverted_residual import NetworkSplit, split_before_last_blocks

__all__ = ["LastBlocks"]


class LastBlocks(Technique):
    """Train the last blocks of a mobile net."""

    name: ClassVar[str] = "last-blocks"
    conflicts_with: ClassVar[Mapping[str, str]] = {
        "bias": "it trains biases below the last blocks too",
        "gradient-checkpointing": "statistics would count each batch twice",
        "head-only": "the head is already trained with the blocks",
        "dynamic-pruning": "all weights are trained under masks",
        "full": "full trains the last blocks among all the rest",
        "lora": "low-rank pairs hide the convolutions that identify blocks",
        "batch-norm": "it trains norms below the last blocks too",
        "qlora": "low-rank pairs hide the convolutions that identify blocks",
        "tinytl": "it trains branches below the last blocks too",
    }

    num_blocks: int = Field(3, ge=1, description="number of trained blocks, counted from the last")
    head_convolution: Literal["train", "freeze"] = Field("train", description="the convolution after the blocks")
    norm_statistics: Literal["update", "frozen"] = Field("update", description="statistics of the trained norms")
    micro_batch_size: int | None = Field(
        None, ge=1, description="examples per micro-batch of the frozen part; null: all"
    )

    def rewrite_model(self, model: nn.Module, task: Task, seed: int) -> None:
        """Unfreeze the last blocks and the head."""
        found = split_before_last_blocks(model, self.num_blocks)
        tail = found.tail if self.head_convolution == "train" else None
        whole = [block.name for block in found.blocks] + ([*tail.convolutions, *tail.norms] if tail else [])
        inside = tuple(f"{name}." for name in whole)
        unfreeze_parameters(model, [name for name, _ in model.named_parameters() if name.startswith(inside)])
        unfreeze_parameters(model, list_head_parameters(model))
        if self.norm_statistics == "update":
            for name in _norms(found, with_tail=tail is not None):
                replace_layer(model, name, unfreeze_batch_norm)
        if self.micro_batch_size is not None:
            run_frozen_prefix(model, found.frozen_modules, self.micro_batch_size, cache_outputs=False)

    def _fold(self, model: nn.Module) -> None:
        """Restore plain norms with the trained weights."""
        restore_plain_layers(model)


def _norms(found: NetworkSplit, *, with_tail: bool) -> list[str]:
    inside = [norm for block in found.blocks for norm in (*block.inner_norms, block.last_norm)]
    return inside + list(found.tail.norms) if with_tail else inside
