"""BitFit: train only the bias terms and the new head of a classifier.

What: every parameter named ``bias`` is trained. This includes the shifts of normalisation layers.
Saves: the inputs of all linear layers, which only weight gradients need. Activations that non-linear functions store
remain. In a net of convolutions and batch norms, almost all activation memory is saved: convolutions and norms store
nothing, and ReLU and ReLU6 store one bit per element. The PyTorch versions store their whole inputs.
Sends: one number per output channel, about 0.1 % of an encoder.
Exactness: gradients are bit-equal to those of plain layers.
Use when: the uplink is the bottleneck and the model has biases (BERT, RoBERTa, GPT-2, OPT, ViT, nets with batch norms).
Avoid when: the model has few biases (Llama and similar models). A model without any is refused.
Source: Ben Zaken, Ravfogel and Goldberg, "BitFit" (arXiv 2106.10199), section 3. For convolutional nets: Cai et al.,
"TinyTL" (arXiv 2007.11622). This is their TinyTL-B, except that the net keeps its own norms.
"""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import nn

from fedtune.tasks import Task
from fedtune.techniques._layers.efficient_layers import has_batch_norms, make_model_efficient
from fedtune.techniques._layers.layer_replacement import restore_plain_layers
from fedtune.techniques._technique import Technique, list_head_parameters, unfreeze_parameters

__all__ = ["Bias"]


class Bias(Technique):
    """Train bias terms and a classifier's head."""

    name: ClassVar[str] = "bias"
    fits_zeroth_order: ClassVar[bool] = True
    fits_plain_blocks: ClassVar[bool] = True
    paged_base_problem: ClassVar[str | None] = None
    allows_kv_cache: ClassVar[bool] = True
    conflicts_with: ClassVar[Mapping[str, str]] = {
        "head-only": "the head is already trained with the biases",
        "full": "full trains biases among all the rest",
    }

    store_activations: bool = Field(False, description="ordinary autograd, for comparison")

    def rewrite_model(self, model: nn.Module, task: Task, seed: int) -> None:
        """Unfreeze the biases, then the head."""
        unfreeze_parameters(model, [name for name, _ in model.named_parameters() if name.endswith("bias")])
        if task.has_new_head:
            unfreeze_parameters(model, list_head_parameters(model))
        if has_batch_norms(model) and not self.store_activations:
            make_model_efficient(model)

    def make_reference(self) -> "Bias":
        """Return the same network with stored activations."""
        return self.model_copy(update={"store_activations": True})

    def _fold(self, model: nn.Module) -> None:
        """Replace the special layers by plain ones with the same weights."""
        restore_plain_layers(model)
