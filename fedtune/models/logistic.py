"""Multinomial logistic regression on raw pixels: the smallest honest model, for baselines and engine benchmarks."""

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from .classifier import ImageClassifier

__all__ = ["Logistic"]


class Logistic(ImageClassifier):
    """Images are scaled to side x side pixels and their channels averaged. The weights start at zero."""

    kind: ClassVar[str] = "pixel-logistic"
    head: ClassVar[str] = "classifier"

    def __init__(self, labels: int, side: int = 28) -> None:
        super().__init__(side=side)
        self.side = side
        self.classifier = nn.Linear(side**2, labels)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def logits(self, pixels: Tensor) -> Tensor:
        """[n, c, h, w] -> [n, labels]."""
        side = (self.side, self.side)
        grey = pixels.mean(dim=1, keepdim=True)
        if grey.shape[-2:] != side:
            grey = F.interpolate(grey, size=side, mode="bilinear", antialias=True)
        out: Tensor = self.classifier(grey.flatten(1))
        return out
