"""Activation pruning: linear layers and convolutions store only the largest entries of their input for the gradient.

What: of a layer's input x the share ``pruned_fraction`` of smallest size is not stored; the weight's gradient is taken
with what is left, x_hat. Outputs, gradients by inputs and by biases are exact, so no error travels from layer to layer.
A tensor that several layers read is stored once. ReLU and ReLU6 keep one bit in place of their result, convolutions of
frozen weight nothing. ``standardise_weights``: convolutions normalise their weights and the batch norms behind them go
(NSConv): nothing is stored for norms, and no step depends on its batch. It trains nothing itself.
Saves: with r the share kept, 4 r + 1/8 bytes of an entry's 4, or 8 r where a list of places is shorter than one bit
each; ``half``: 2 r + 1/8. What other layers keep stays: a frozen LayerNorm its input, GELU its input, attention its
operands, a batch norm its input, pooling its input. They set the ceiling: MiniLM with LoRA at 5 x 64 tokens keeps 47.8
MB, pruned by half 40.6, by nine tenths 32.3; on query and value alone 32.6, 31.2, 30.0. Nets of convolutions go
further: ResNet-18 at 8 x 32 pixels keeps 37.5 MB, pruned by 70 % in half precision 23.4, and normalised 3.8; the last
three blocks of EfficientNet-Lite0 at 8 x 96 pixels keep 7.28, by half 3.92, with ``mobiletl`` 1.50. All bytes are our
meter's, without dropout. The process's memory falls by less, as small pieces that stay leave holes: all of Lite0
trained, by 9 MB where 56 fewer are kept, and by 39 when glibc maps pieces from 256 kB by themselves
(MALLOC_MMAP_THRESHOLD_).
Costs: a search in every input, about as long as the step itself on one processor core. Sends: what stands beside it
sends.
Error: cosine of weight gradients to the exact ones, mean over layers, pruned by 50, 70 and 90 %: EfficientNet-Lite0's
last blocks .99, .97, .84 (mean of two bases); MiniLM with LoRA .99, .95, .83, worst in the layer behind GELU, .97, .87,
.65. ``fedtune profile --check`` compares with everything stored and shows it: entries are wrong by tens of percent of
the largest, by design. ``centre_features`` takes the mean of each feature out of a linear layer's input and adds its
part exactly: .99, .97, .91 for all of MiniLM where it is .99, .95, .84 without; it costs one number per feature.
Use when: a net of convolutions is trained and activations fill the device; with ``standardise_weights`` where a net is
trained from scratch, in small batches or with ``dynamic-pruning``, whose masks it respects.
Avoid when: gradients have to be exact (``gradient-checkpointing``); only biases, norms or B of LoRA are trained, as in
its odd rounds: nothing is left to prune. ``standardise_weights`` throws a pretrained net's scales away: not for
fine-tuning. A first layer that reads pictures with a bright or dark background may keep the background and drop the
rest: its cosine was .56 in a normalised ResNet-18 on Fashion-MNIST at 50 %, .86 in the head, above .99 in all between.
Source: Huang et al., "FedMef: Towards Memory-efficient Federated Dynamic Pruning" (CVPR 2024), scaled activation
pruning; the rule is that of Chen et al., "DropIT" (ICLR 2023). Read: FedMef's abstract, reviews and released code, in
which the cache holds 32-bit places outside autograd's sight and NSConv is missing; not its body. Reconstructed: NSConv,
as scaled weight standardisation (Brock, De and Smith, arXiv 2101.08692) over active weights. Ours: bit maps for places,
shared inputs, masked ReLUs, rows (``granularity``), ``centre_features``, and what concerns transformers. Left dense:
GPT-2's Conv1D, paddings other than zeros, and the second half of low-rank pairs, which reads a few numbers per token.
"""

from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from fedtune.errors import ModelError
from fedtune.recipe import TaskName
from fedtune.techniques._masked import EXACT_GRADIENTS, OneBitActivation, make_one_bit_activation
from fedtune.techniques._normalised_conv import (
    find_conv_norm_pairs,
    iter_standardised_conv2d,
    restore_batch_norms,
    standardise_convolutions,
)
from fedtune.techniques._pruned import PruningRule
from fedtune.techniques._pruned_layers import InputStorage, RecentInputs, attach_input_pruning, detach_input_pruning
from fedtune.techniques._recast import replace_layer, restore_plain_layers
from fedtune.techniques._technique import Technique, unfreeze_parameters

__all__ = ["ActivationPruning"]


class ActivationPruning(Technique):
    """Store layers' inputs pruned."""

    name: ClassVar[str] = "activation-pruning"
    selects_trainable_tensors: ClassVar[bool] = False

    pruned_fraction: float = Field(0.5, ge=0, lt=1, description="share of a layer's input that is not stored")
    value_precision: Literal["full", "half"] = Field(
        "full", description="half: 2 bytes a value, where none exceeds 65504"
    )
    granularity: Literal["auto", "row", "tensor"] = Field(
        "auto", description="what the largest are chosen from: a token or picture (row), or all; auto: tokens, else all"
    )
    centre_features: bool = Field(
        False, description="take the mean of each feature out of a linear layer's input first"
    )
    standardise_weights: bool = Field(
        False, description="normalise convolutions' weights in place of batch norms behind them"
    )

    def rewrite_model(self, model: nn.Module, task: TaskName, seed: int) -> None:
        """Swap batch norms for normalised weights if asked to; layers are told in ``begin_round``."""
        vars(model)["activation_pruning"] = RecentInputs()
        if self.standardise_weights:
            unfreeze_parameters(
                model, standardise_convolutions(model, find_conv_norm_pairs(model), self._convolutions(model))
            )

    def begin_round(self, model: nn.Module, number: int) -> None:
        """Tell the layers, as all techniques have left them, to store their inputs pruned."""
        frozen = next((name for name, layer in iter_standardised_conv2d(model) if not layer.weight.requires_grad), None)
        if frozen is not None:
            raise ModelError(
                f"activation-pruning's standardise_weights rescales {frozen}, which is frozen; train it (full) or "
                "leave it out"
            )
        if self.pruned_fraction or self.value_precision == "half":
            _mask_activations(model)
        rule = PruningRule(self.pruned_fraction, self.value_precision == "half", self.centre_features)
        linear = InputStorage(rule, self.granularity != "tensor", _latest(model))
        if not attach_input_pruning(model, linear, self._convolutions(model)) and not self.standardise_weights:
            raise ModelError(
                f"{type(model).__name__} has no linear layer or convolution; leave the technique activation-pruning out"
            )

    def begin_step(self, model: nn.Module, batch: Mapping[str, Tensor], progress: float) -> None:
        """Let go of what the last step stored."""
        _latest(model).clear()

    def make_reference(self) -> "ActivationPruning":
        """The same network with inputs stored whole: the difference is what pruning costs."""
        return self.model_copy(update={"pruned_fraction": 0.0, "value_precision": "full"})

    def has_unchanged_base(self) -> bool:
        """Not without its batch norms."""
        return not self.standardise_weights

    def _fold(self, model: nn.Module) -> None:
        """Let layers be plain again."""
        detach_input_pruning(model)
        restore_batch_norms(model)
        restore_plain_layers(model)
        del vars(model)["activation_pruning"]

    def _convolutions(self, model: nn.Module) -> InputStorage:
        return InputStorage(
            PruningRule(self.pruned_fraction, self.value_precision == "half"), self.granularity == "row", _latest(model)
        )


def _latest(model: nn.Module) -> RecentInputs:
    found: RecentInputs = vars(model)["activation_pruning"]
    return found


def _mask_activations(model: nn.Module) -> None:
    """Let ReLU and ReLU6 keep a bit, or they would keep whole what the next layer stores pruned."""
    inner = {layer.activation for layer in model.modules() if isinstance(layer, OneBitActivation)}
    for name, layer in list(model.named_modules()):
        if type(layer) in EXACT_GRADIENTS and layer not in inner and "forward" not in vars(layer):
            replace_layer(model, name, partial(make_one_bit_activation, rules=EXACT_GRADIENTS))
