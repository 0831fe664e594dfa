"""DIVISION: layers keep the input of the forward pass as local means and two to four bits per number.

What: the input x of a layer is kept as two parts. The low part is the mean over blocks of 8 x 8 pixels, in bfloat16.
The high part, x minus the repeated mean, is quantised in ``bits`` bits for each sample and channel with stochastic
rounding. Backward uses their sum, whose expectation is x. Convolutions use ``bits``; batch norms, the most sensitive
layers, and activation functions use ``norm_bits``. ReLU and ReLU6 keep one bit per number and stay exact.
Saves: at 32 x 32 pixels, a number takes 16 / 64 + 2 + 32 / 1024 = 2.28 bits instead of 32. What attention and pooling
keep stays.
Costs: several passes over each kept input.
Sends: what the other technique sends.
Error: gradients are approximate. Where activation functions and norms read rounded inputs, the error passes on to the
layers below.
Use when: you train a convolutional net, and its activations fill the device's memory.
Avoid when: gradients must be exact. Also avoid it for text (``tokens``): the paper compresses image models. Tokens are
less smooth than pixels; ``int8-activations`` and ``gradient-checkpointing`` stand beside it.
Source: Wang et al., "DIVISION: Memory Efficient Training via Dual Activation Precision" (arXiv 2208.04187), equations 4
to 6 as their released code computes them: average pooling, nearest upsampling, asymmetric quantisation per sample and
channel. Deviations: blocks at the border may be smaller than 8 x 8, and the repeated mean is cut there. The range is
widened to what bfloat16 can hold, so that no value is clipped. ``tokens`` averages over 8 tokens of each feature, which
the release names and lacks. Four bits for batch norms.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from fedtune.models.efficientnet_lite import SameConv2d
from fedtune.techniques._codecs.frequency_split import FrequencySplit
from fedtune.techniques._codecs.saved_inputs import detach_codecs
from fedtune.techniques._layers.conv2d import make_efficient_conv2d
from fedtune.techniques._layers.layer_replacement import replace_layer, restore_plain_layers
from fedtune.techniques._layers.one_bit_activation import mask_activations
from fedtune.techniques._layers.tensorflow_padding import move_padding_into_conv2d
from fedtune.techniques._technique import Technique
from fedtune.techniques.compressed._layer_inputs import RECOMPUTED, attach_codecs

__all__ = ["Division"]


class Division(Technique):
    """Keep the inputs of layers as local means and a quantised rest."""

    name: ClassVar[str] = "division"
    has_exact_gradients: ClassVar[bool] = False
    selects_trainable_tensors: ClassVar[bool] = False
    allows_kv_cache: ClassVar[bool] = True
    conflicts_with: ClassVar[Mapping[str, str]] = RECOMPUTED

    block: int = Field(8, ge=1, description="pixels of a side, or tokens, that share a mean")
    bits: Literal[1, 2, 4, 8] = Field(2, description="bits of the rest, for convolutions and linear layers")
    norm_bits: Literal[1, 2, 4, 8] = Field(4, description="the same for norms and activation functions")
    tokens: bool = Field(True, description="also compress inputs [n, tokens, features]")
    min_bytes: int = Field(1024, ge=0, description="smaller inputs are kept as they are")

    def begin_round(self, model: nn.Module, round_number: int) -> None:
        """Configure the layers after all techniques have rewritten the model."""
        move_padding_into_conv2d(model)
        mask_activations(model)
        for name, layer in list(model.named_modules()):
            if type(layer) is SameConv2d:
                replace_layer(model, name, make_efficient_conv2d)
        few, more = (self._make_codec(bits) for bits in (self.bits, self.norm_bits))
        images = {"convolution": few, "batch_norm": more, "activation": more}
        attach_codecs(model, {**images, "matrix": few, "norm": more} if self.tokens else images, self.name)

    def make_reference(self) -> None:
        """Return the technique with exact inputs; the difference is the error of the codec."""

    def _make_codec(self, bits: int) -> FrequencySplit:
        return FrequencySplit(self.min_bytes, self.block, bits, self.tokens)

    def _fold(self, model: nn.Module) -> None:
        """Restore plain layers."""
        detach_codecs(model)
        restore_plain_layers(model)
