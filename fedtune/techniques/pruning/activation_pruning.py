"""Activation pruning: linear layers and convolutions store only the largest entries of their input for the gradient.

What: a layer drops the fraction ``pruned_fraction`` of its input x with the smallest magnitude and stores the rest,
x_hat. The weight gradient is computed from x_hat. Outputs and the gradients of inputs and biases stay exact, so the
error does not pass from layer to layer. A tensor that several layers read is stored once. ReLU and ReLU6 store one bit
per entry instead of their output, and convolutions with frozen weights store nothing. With ``standardise_weights``,
convolutions normalise their weights and the batch norms behind them are removed (NSConv): norms then store nothing, and
no step depends on its batch. This technique trains nothing itself.
Saves: with r the fraction kept, an entry takes 4 r + 1/8 bytes instead of 4, or 8 r if a list of indices is shorter
than one bit per entry. With ``half`` precision it takes 2 r + 1/8. Other layers store what they stored before: a frozen
LayerNorm, GELU, batch norm and pooling their inputs, and attention its operands. They limit the saving. MiniLM with
LoRA at 5 x 64 tokens stores 47.8 MB; pruned by half 40.6, by nine tenths 32.3. On query and value alone the numbers are
32.6, 31.2 and 30.0. Convolutional nets save more. ResNet-18 at 8 x 32 pixels stores 37.5 MB; pruned by 70 % in half
precision 23.4, with standardised weights 3.8. The last three blocks of EfficientNet-Lite0 at 8 x 96 pixels store 7.28
MB; pruned by half 3.92, with ``mobiletl`` 1.50. All numbers are metered activation memory, without dropout. The
process's memory falls by less than the meter reports, because small live allocations fragment the heap. Example: all of
Lite0 trained. The meter reports 56 MB less, the process uses 9 MB less. With MALLOC_MMAP_THRESHOLD_ at 256 kB (glibc)
it uses 39 MB less.
Costs: a search in every input. On one processor core it takes about as long as the step itself.
Sends: what the other technique sends.
Error: the cosine between pruned and exact weight gradients, mean over layers, pruned by 50, 70 and 90 %. The last
blocks of EfficientNet-Lite0: .99, .97, .84 (mean of two bases). MiniLM with LoRA: .99, .95, .83; the layer after GELU
is worst with .97, .87, .65. ``fedtune profile --check-gradients`` compares with stored activations and reports the
error: entries are wrong by tens of percent of the largest one, by design. ``centre_features`` subtracts the mean of
each feature from a linear layer's input and adds its contribution exactly. It stores one number per feature. For all of
MiniLM it gives .99, .97, .91 instead of .99, .95, .84.
Use when: you train a convolutional net and activations fill the device's memory. Use ``standardise_weights`` when you
train from scratch, with small batches, or with ``dynamic-pruning``, whose masks it respects.
Avoid when: gradients must be exact (use ``gradient-checkpointing``). Also avoid it when only biases, norms or B of LoRA
are trained, as in LoRA's odd rounds: there is nothing to prune. ``standardise_weights`` discards the scales of a
pretrained net, so do not fine-tune with it. If images have a bright or dark background, the first layer may store the
background and drop the rest. In a normalised ResNet-18 on Fashion-MNIST pruned by 50 %, its cosine was .56, in the head
.86, and above .99 in all layers between.
Source: Huang et al., "FedMef: Towards Memory-efficient Federated Dynamic Pruning" (CVPR 2024), scaled activation
pruning. The selection rule is from Chen et al., "DropIT" (ICLR 2023). We read FedMef's abstract, reviews and released
code, but not its body; in the code, the cache holds 32-bit indices that autograd does not see, and NSConv is missing.
NSConv is reconstructed as scaled weight standardisation (Brock, De and Smith, arXiv 2101.08692) over active weights.
Our additions: bit maps for indices, shared inputs, masked ReLUs, rows (``granularity``), ``centre_features``, and the
support of transformers. Not pruned: GPT-2's Conv1D, paddings other than zeros, and the second half of low-rank pairs,
which reads a few numbers per token.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from fedtune.errors import ModelError
from fedtune.tasks import Task
from fedtune.techniques._layers.layer_replacement import restore_plain_layers
from fedtune.techniques._layers.one_bit_activation import mask_activations
from fedtune.techniques._technique import Technique, unfreeze_parameters
from fedtune.techniques.pruning._pruned_input_layers import (
    InputStorage,
    RecentInputs,
    attach_input_pruning,
    detach_input_pruning,
)
from fedtune.techniques.pruning._pruned_tensor import PruningRule
from fedtune.techniques.pruning._standardised_conv2d import (
    find_conv_norm_pairs,
    iter_standardised_conv2d,
    restore_batch_norms,
    standardise_convolutions,
)

__all__ = ["ActivationPruning"]


class ActivationPruning(Technique):
    """Store only the largest entries of the inputs of layers."""

    name: ClassVar[str] = "activation-pruning"
    fits_plain_blocks: ClassVar[bool] = True
    has_exact_gradients: ClassVar[bool] = False
    selects_trainable_tensors: ClassVar[bool] = False

    pruned_fraction: float = Field(0.5, ge=0, lt=1, description="fraction of a layer's input that is not stored")
    value_precision: Literal["full", "half"] = Field(
        "full", description="half: 2 bytes per value, if none exceeds 65504"
    )
    granularity: Literal["auto", "row", "tensor"] = Field(
        "auto", description="select the largest per token or image (row), or over all; auto: row for tokens"
    )
    centre_features: bool = Field(
        False, description="first subtract the mean of each feature from a linear layer's input"
    )
    standardise_weights: bool = Field(
        False, description="normalise the weights of convolutions and remove the batch norms after them"
    )

    def rewrite_model(self, model: nn.Module, task: Task, seed: int) -> None:
        """Replace batch norms by normalised weights if set; ``begin_round`` configures the layers."""
        vars(model)["activation_pruning"] = RecentInputs()
        if self.standardise_weights:
            unfreeze_parameters(
                model, standardise_convolutions(model, find_conv_norm_pairs(model), self._convolutions(model))
            )

    def begin_round(self, model: nn.Module, round_number: int) -> None:
        """Configure the layers after all techniques have rewritten the model."""
        frozen = next((name for name, layer in iter_standardised_conv2d(model) if not layer.weight.requires_grad), None)
        if frozen is not None:
            raise ModelError(
                f"activation-pruning's standardise_weights rescales {frozen}, which is frozen; train it or unset it"
            )
        if self.pruned_fraction or self.value_precision == "half":
            mask_activations(model)
        rule = PruningRule(self.pruned_fraction, self.value_precision == "half", self.centre_features)
        linear = InputStorage(rule, self.granularity != "tensor", _latest(model))
        if not attach_input_pruning(model, linear, self._convolutions(model)) and not self.standardise_weights:
            raise ModelError(
                f"{type(model).__name__} has no linear layer or convolution; leave the technique activation-pruning out"
            )

    def begin_step(self, model: nn.Module, batch: Mapping[str, Tensor], progress: float) -> None:
        """Free what the last step stored."""
        _latest(model).clear()

    def make_reference(self) -> "ActivationPruning":
        """Return the same network with complete inputs; the difference is the error of pruning."""
        return self.model_copy(update={"pruned_fraction": 0.0, "value_precision": "full"})

    def has_unchanged_base(self) -> bool:
        """Return whether the batch norms are still there."""
        return not self.standardise_weights

    def _fold(self, model: nn.Module) -> None:
        """Restore plain layers."""
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
