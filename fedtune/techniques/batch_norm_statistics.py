"""Live norms: batch-norm layers learn their statistics from the clients' data, and the server pools them.

What: running mean and variance of every batch norm follow the batches a client sees and are sent with what is trained.
The server weighs means and variances by examples and adds the spread of the means to the variances, so that they are
those of all examples together. With ``local`` each device keeps weight, bias, mean and variance of every batch norm for
itself: they are trained there, but neither sent nor merged (FedBN), from the pretrained ones on.
Saves: nothing; a norm that looks at the batch keeps its input.
Sends: two numbers per channel more; with ``local`` nothing of any batch norm.
Use when: a net with batch norms is trained from scratch, or far from what it was pretrained on; ``local`` when
devices see pictures of different kinds, such as other cameras or lights, and each uses the model it trained.
Avoid when: the pretrained statistics fit (the default keeps them), or batches are tiny: below 32 values per channel a
layer falls back on its running statistics. With ``local`` the server has no whole model: only clients can score one, on
what they hold out (``evaluation.local_holdout``), and an export has the norms of before training.
Source: Ioffe and Szegedy, "Batch Normalization" (arXiv 1502.03167); the merge is the law of total variance.
``local``: Li et al., "FedBN" (arXiv 2102.07623).
"""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import nn

from fedtune.errors import ModelError
from fedtune.recipe import TaskName
from fedtune.techniques._live_norm import UnfrozenBatchNorm2d, list_local_tensors
from fedtune.techniques._technique import Technique, unfreeze_parameters

__all__ = ["BatchNormStatistics"]


class BatchNormStatistics(Technique):
    """Let batch norms follow the data."""

    name: ClassVar[str] = "batch-norm-statistics"
    selects_trainable_tensors: ClassVar[bool] = False
    conflicts_with: ClassVar[Mapping[str, str]] = {
        "gradient-checkpointing": "blocks that run again would count their batch twice"
    }

    local: bool = Field(False, description="each device keeps its batch norms for itself")

    def rewrite_model(self, model: nn.Module, task: TaskName, seed: int) -> None:
        """Put a live norm in the place of each plain one; ModelError when the model has none."""
        norms = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)]
        if not norms:
            raise ModelError(f"{type(model).__name__} has no batch norm for {self.name} to follow; drop {self.name}")
        for name, layer in norms:
            model.set_submodule(name, UnfrozenBatchNorm2d.from_batch_norm(layer, self.local))
        if self.local:
            norm_parameters = set(list_local_tensors(model)) & dict(model.named_parameters()).keys()
            unfreeze_parameters(model, sorted(norm_parameters))

    def has_local_tensors(self) -> bool:
        """When they are local."""
        return self.local

    def _fold(self, model: nn.Module) -> None:
        """Plain norms again."""
        for name, layer in list(model.named_modules()):
            if isinstance(layer, UnfrozenBatchNorm2d):
                model.set_submodule(name, layer.to_plain_layer())
