"""What the image models defined here have in common. Nothing of fedtune is imported: the file travels with a model."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

__all__ = ["ClassifierOutput", "ImageClassifier"]


class ClassifierOutput(NamedTuple):
    """The mean cross-entropy where labels were given, and logits [n, labels]."""

    loss: Tensor | None
    logits: Tensor


class ImageClassifier(nn.Module, ABC):
    """A chain of stages, made from the number of labels and, by name, from ``settings``."""

    kind: ClassVar[str]
    """What its folder's config.json calls it."""
    head_name: ClassVar[str]
    """The layer that is new when the labels are."""
    supports_gradient_checkpointing: ClassVar[bool] = True

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings
        self._checkpointed = False

    @abstractmethod
    def stages(self) -> Sequence[nn.Module]:
        """The net as it is now: stem, each block, the rest; every one takes the output of the one before, alone.

        They hold all parameters and buffers. What is no submodule of its own is bundled anew in each call, so that a
        layer that was replaced is always seen.
        """

    def activation_checkpointing_enable(self, _: Any = None) -> None:
        """Keep each stage's input only, from now on."""
        self._checkpointed = True

    def logits(self, pixels: Tensor) -> Tensor:
        """[n, 3, h, w] -> [n, labels]."""
        x = pixels
        for stage in self.stages():
            x = checkpoint(stage, x, use_reentrant=False) if self._checkpointed and self.training else stage(x)
        return x

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> ClassifierOutput:
        """Logits [n, labels], and the mean cross-entropy when labels [n] are given."""
        logits = self.logits(pixel_values)
        return ClassifierOutput(None if labels is None else F.cross_entropy(logits, labels), logits)
