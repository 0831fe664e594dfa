"""Eight-bit activations: layers keep their input for backward in eight bits per number. The control of its kind.

What: linear layers, convolutions, norms and activation functions keep the input x as round(127 x / max |x|), with one
scale per token, or per channel of an image. The forward pass is not changed. Weight gradients and the gradients through
norms and activation functions are computed from the rounded input, so errors pass on to the layers below. Everything
else that these layers save stays exact: masks, indices, statistics, weights. Small inputs are kept as they are.
Saves: three quarters of the kept inputs. What attention keeps (queries, keys, values, its output) stays, and so does
dropout's mask. An attention output is then kept twice, exact by attention and in eight bits by the layer after it.
Costs: two passes over each kept input.
Sends: what the other technique sends.
Use when: you want to know what a simple codec does, beside ``division`` and ``gradient-checkpointing``.
Avoid when: gradients must be exact. ``gradient-checkpointing`` keeps less with exact gradients.
Source: the usual symmetric quantisation; compare Chen et al., "ActNN" (arXiv 2104.14129), which rounds stochastically
in two bits, equation 5. Deviations: rounding to the nearest code, eight bits, a scale per token.
"""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import nn

from fedtune.techniques._codecs.int8_rows import Int8Rows
from fedtune.techniques._codecs.saved_inputs import detach_codecs
from fedtune.techniques._technique import Technique
from fedtune.techniques.compressed._layer_inputs import RECOMPUTED, attach_codecs

__all__ = ["Int8Activations"]


class Int8Activations(Technique):
    """Keep the inputs of layers in eight bits."""

    name: ClassVar[str] = "int8-activations"
    has_exact_gradients: ClassVar[bool] = False
    selects_trainable_tensors: ClassVar[bool] = False
    allows_kv_cache: ClassVar[bool] = True
    conflicts_with: ClassVar[Mapping[str, str]] = {**RECOMPUTED, "division": "both change the form of the same inputs"}

    min_bytes: int = Field(1024, ge=0, description="smaller inputs are kept as they are")

    def begin_round(self, model: nn.Module, round_number: int) -> None:
        """Configure the layers after all techniques have rewritten the model."""
        kinds = ("matrix", "convolution", "norm", "batch_norm", "activation")
        attach_codecs(model, dict.fromkeys(kinds, Int8Rows(self.min_bytes)), self.name)

    def make_reference(self) -> None:
        """Return the technique with exact inputs; the difference is the error of rounding."""

    def _fold(self, model: nn.Module) -> None:
        """Restore the layers' own ``forward``."""
        detach_codecs(model)
