"""What the image models defined here have in common. Nothing of fedtune is imported: the file travels with a model."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Classified", "ImageClassifier"]


class Classified(NamedTuple):
    """The mean cross-entropy where labels were given, and logits [n, labels]."""

    loss: Tensor | None
    logits: Tensor


class ImageClassifier(nn.Module, ABC):
    """Made from the number of labels and, by name, from ``settings``."""

    kind: ClassVar[str]
    """The ``model_type`` in its folder's config.json."""
    head: ClassVar[str]
    """The layer that is new when the labels are."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings

    @abstractmethod
    def logits(self, pixels: Tensor) -> Tensor:
        """[n, 3, h, w] -> [n, labels]."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> Classified:
        """Logits [n, labels], and the mean cross-entropy when labels [n] are given."""
        logits = self.logits(pixel_values)
        return Classified(None if labels is None else F.cross_entropy(logits, labels), logits)
