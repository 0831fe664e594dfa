"""MobileTL: train the last inverted residual blocks, with one-bit masks instead of stored activations.

What: in the last ``num_blocks`` blocks, trains all convolutions, the shifts of the inner norms, and the last norm with
its statistics. ``head_convolution`` selects whether the convolution after the blocks is trained. A classifier's new
head is trained too. Everything below is frozen.
Saves: inner norms store nothing, because their scale and statistics are frozen. Activation functions store one bit per
element instead of 32. Padding is not stored. In a block that expands t-fold, 2 + 6 t maps become 2 + 2 t + t / 16. The
frozen part runs without an autograd graph. Its large maps determine the resident memory, so it processes
``micro_batch_size`` examples at a time.
Sends: the weights of those blocks, and the statistics of their last norms.
Exactness: for nets with ReLU and ReLU6, gradients equal those of the same network with stored activations.
``relu6_gradient: paper`` uses the published mask 1[x >= 0] for ReLU6. Hard-swish has no exact one-bit mask; 1[x >= 0]
is the published one, and ``hard_swish_gradient: exact`` stores its input. Squeeze-excite is trained as usual. Its
output is recomputed for the next convolution, which would otherwise store it too. With micro-batches, the output of the
frozen part equals that of the whole batch up to rounding.
Use when: a mobile net classifies images on a device whose memory is filled by activations.
Avoid when: the net has no such blocks (it is refused), or all of it must be trained (use ``full``).
Source: Chiang, Frumkin, Liang and Marculescu, "MobileTL: On-device Transfer Learning with Inverted Residual Blocks"
(AAAI 2023). We read the authors' page with its formulas and charts, and the abstract, but not the body; no code was
published. Reconstructed: the treatment of the head convolution, and the mask of ReLU6. Headline: 46.3 % less memory in
a MobileNetV2 block and 53.3 % in one of V3, counted as in the paper, where a plain ReLU6 stores two bits. Deviations:
the exact mask for ReLU6 is the default. Batch statistics need at least 32 values per channel. Swish and other functions
store their input. ``cache_outputs``, which stores the output of the frozen part on disk, indexed by the pixels, is an
extension.
"""

from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import nn

from fedtune.tasks import Task
from fedtune.techniques._layers.efficient_layers import make_layer_efficient, unfreeze_batch_norm
from fedtune.techniques._layers.layer_replacement import replace_layer, restore_plain_layers
from fedtune.techniques._layers.one_bit_activation import EXACT_GRADIENTS, SIGN_GRADIENTS, GradientRule
from fedtune.techniques._layers.tensorflow_padding import move_padding_into_conv2d
from fedtune.techniques._technique import Technique, list_head_parameters, unfreeze_parameters
from fedtune.techniques.mobile._frozen_prefix import run_frozen_prefix
from fedtune.techniques.mobile._inverted_residual import NetworkSplit, split_before_last_blocks
from fedtune.techniques.mobile._product_input_conv2d import make_product_input_conv2d

__all__ = ["Mobiletl"]


class Mobiletl(Technique):
    """Train the last blocks of a mobile net with little activation memory."""

    name: ClassVar[str] = "mobiletl"
    conflicts_with: ClassVar[Mapping[str, str]] = {
        "bias": "its frozen part has no gradients",
        "gradient-checkpointing": "statistics would count each batch twice",
        "head-only": "the head is already trained with the blocks",
        "dynamic-pruning": "all weights are trained under masks",
        "full": "its frozen part has no gradients",
        "last-blocks": "both train the last blocks",
        "batch-norm-statistics": "its frozen part keeps its statistics",
        "lora": "its frozen part has no gradients",
        "batch-norm": "its frozen part has no gradients",
        "qlora": "its frozen part has no gradients",
        "tinytl": "its frozen part has no gradients",
    }

    num_blocks: int = Field(3, ge=1, description="number of trained blocks, counted from the last")
    relu6_gradient: Literal["exact", "paper"] = Field("exact", description="where ReLU6 passes the gradient")
    hard_swish_gradient: Literal["paper", "exact"] = Field("paper", description="exact: its input is stored")
    head_convolution: Literal["train", "freeze"] = Field("train", description="the convolution after the blocks")
    last_norm_statistics: Literal["update", "frozen"] = Field(
        "update", description="statistics of each block's last norm"
    )
    micro_batch_size: int = Field(1, ge=1, description="examples per micro-batch of the frozen part")
    cache_outputs: bool = Field(False, description="store the outputs of the frozen part on disk")
    store_activations: bool = Field(False, description="ordinary autograd, for comparison")

    @model_validator(mode="after")
    def _cached_one_by_one(self) -> Self:
        if self.cache_outputs and self.micro_batch_size > 1:
            raise ValueError("cache_outputs stores one example at a time; leave micro_batch_size at 1")
        return self

    def rewrite_model(self, model: nn.Module, task: Task, seed: int) -> None:
        """Train the last blocks and the head; the frozen part stores nothing."""
        found = split_before_last_blocks(model, self.num_blocks)
        if self.last_norm_statistics == "update":
            for block in found.blocks:
                replace_layer(model, block.last_norm, unfreeze_batch_norm)
        unfreeze_parameters(model, [*self._trained(model, found), *list_head_parameters(model)])
        if not self.store_activations:
            self._spare(model, found)
            run_frozen_prefix(model, found.frozen_modules, self.micro_batch_size, cache_outputs=self.cache_outputs)

    def make_reference(self) -> "Mobiletl":
        """Return the same network with stored activations and exact gradients."""
        return self.model_copy(update={"store_activations": True})

    def _fold(self, model: nn.Module) -> None:
        """Replace the special layers by plain ones with the same weights."""
        restore_plain_layers(model)

    def _trained(self, model: nn.Module, found: NetworkSplit) -> list[str]:
        whole = [
            layer for block in found.blocks for layer in (*block.convolutions, *block.gate_layers, block.last_norm)
        ]
        shifted = [norm for block in found.blocks for norm in block.inner_norms]
        if self.head_convolution == "train":
            whole += found.tail.convolutions
            shifted += found.tail.norms
        shifts = {f"{norm}.bias" for norm in shifted}
        inside = tuple(f"{layer}." for layer in whole)
        return [name for name, _ in model.named_parameters() if name.startswith(inside) or name in shifts]

    def _spare(self, model: nn.Module, found: NetworkSplit) -> None:
        move_padding_into_conv2d(model)
        make = partial(make_layer_efficient, rules=self._rules())
        tail = found.tail
        for block in found.blocks:
            for name in (*block.convolutions, *block.inner_norms, *block.activations, block.last_norm):
                replace_layer(model, name, make)
            if block.gate_layers:
                replace_layer(model, block.convolutions[-1], make_product_input_conv2d)
        for name in (*tail.convolutions, *tail.norms, *tail.activations, *tail.dropouts):
            replace_layer(model, name, make)

    def _rules(self) -> Mapping[type[nn.Module], GradientRule]:
        rules = dict(EXACT_GRADIENTS)
        if self.relu6_gradient == "paper":
            rules[nn.ReLU6] = SIGN_GRADIENTS[nn.ReLU6]
        if self.hard_swish_gradient == "paper":
            rules[nn.Hardswish] = SIGN_GRADIENTS[nn.Hardswish]
        return rules
