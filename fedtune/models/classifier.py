"""The base class of fedtune's image models.

This file imports nothing of fedtune, because it is saved beside the weights.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ClassifierOutput", "ImageClassifier"]


class ClassifierOutput(NamedTuple):
    """The mean cross-entropy loss if labels were given, and the logits [n, labels]."""

    loss: Tensor | None
    logits: Tensor


class ImageClassifier(nn.Module, ABC):
    """A sequence of stages, constructed from the number of labels and keyword ``settings``."""

    kind: ClassVar[str]
    """The kind of the model in the folder's config.json."""
    head_name: ClassVar[str]
    """The name of the layer that is replaced when the number of labels changes."""
    supports_gradient_checkpointing: ClassVar[bool] = True

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings
        self._call_checkpointed: Callable[[nn.Module, Tensor], Tensor] | None = None

    @abstractmethod
    def stages(self) -> Sequence[nn.Module]:
        """Return the stages in order: stem, blocks, classifier. Each stage takes only the output of the previous one.

        Together they hold all parameters and buffers. Stages that are not submodules are built in each call, so that
        replaced layers are included.
        """

    def enable_checkpointing(self, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        """Enable gradient checkpointing: ``call`` runs a stage and keeps only its input for backward."""
        self._call_checkpointed = call

    def logits(self, pixels: Tensor) -> Tensor:
        """Return logits: [n, 3, h, w] -> [n, labels]."""
        x = pixels
        for stage in self.stages():
            x = self._call_checkpointed(stage, x) if self._call_checkpointed and self.training else stage(x)
        return x

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> ClassifierOutput:
        """Return the logits [n, labels], and the mean cross-entropy loss if labels [n] are given."""
        logits = self.logits(pixel_values)
        return ClassifierOutput(None if labels is None else F.cross_entropy(logits, labels), logits)
