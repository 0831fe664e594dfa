"""Live norms: batch-norm layers learn their statistics from the clients' data, and the server pools them.

What: the running mean and variance of every batch norm follow the client's batches and are sent with the trained
tensors. The server averages means and variances by number of examples and adds the variance between the means. The
result equals the statistics of all examples together. With ``local``, each device keeps the weight, bias, mean and
variance of its batch norms: it trains them from the pretrained values but neither sends nor merges them (FedBN).
Saves: nothing. A norm that uses batch statistics stores its input.
Sends: two more numbers per channel; with ``local``, nothing of any batch norm.
Use when: a net with batch norms is trained from scratch, or on data far from its pretraining. Use ``local`` when
devices see different kinds of images, such as other cameras or lights, and each device uses the model that it trained.
Avoid when: the pretrained statistics fit (other techniques keep them), or batches are tiny: below 32 values per
channel, a layer uses its running statistics. With ``local``, the server has no complete model. Only clients can score
it, on their local hold-out (``evaluation.local_holdout``), and an export has the batch norms from before training.
Source: Ioffe and Szegedy, "Batch Normalization" (arXiv 1502.03167). The merge is the law of total variance. ``local``:
Li et al., "FedBN" (arXiv 2102.07623).
"""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import nn

from fedtune.errors import ModelError
from fedtune.tasks import Task
from fedtune.techniques._layers.unfrozen_batch_norm import UnfrozenBatchNorm2d, list_local_tensors
from fedtune.techniques._technique import Technique, unfreeze_parameters

__all__ = ["BatchNormStatistics"]


class BatchNormStatistics(Technique):
    """Let batch norms follow the data."""

    name: ClassVar[str] = "batch-norm-statistics"
    selects_trainable_tensors: ClassVar[bool] = False
    conflicts_with: ClassVar[Mapping[str, str]] = {
        "gradient-checkpointing": "recomputed blocks would count their batch twice"
    }

    local: bool = Field(False, description="each device keeps its own batch norms")

    def rewrite_model(self, model: nn.Module, task: Task, seed: int) -> None:
        """Replace each batch norm by a live one; ModelError if the model has none."""
        norms = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)]
        if not norms:
            raise ModelError(f"{type(model).__name__} has no batch norm; remove batch-norm-statistics")
        for name, layer in norms:
            model.set_submodule(name, UnfrozenBatchNorm2d.from_batch_norm(layer, self.local))
        if self.local:
            norm_parameters = set(list_local_tensors(model)) & dict(model.named_parameters()).keys()
            unfreeze_parameters(model, sorted(norm_parameters))

    def has_local_tensors(self) -> bool:
        """Return whether the norms are local."""
        return self.local

    def _fold(self, model: nn.Module) -> None:
        """Restore plain norms."""
        for name, layer in list(model.named_modules()):
            if isinstance(layer, UnfrozenBatchNorm2d):
                model.set_submodule(name, layer.to_plain_layer())
