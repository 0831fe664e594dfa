"""Multinomial logistic regression on raw pixels, a small baseline."""

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from .classifier import ImageClassifier

__all__ = ["GreyPixels", "LogisticRegression"]


class GreyPixels(nn.Module):
    """Resizes images to side x side pixels and averages their channels."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, pixels: Tensor) -> Tensor:
        """Return grey pixels: [n, c, h, w] -> [n, side * side]."""
        grey, side = pixels.mean(dim=1, keepdim=True), (self.side, self.side)
        if grey.shape[-2:] != side:
            grey = F.interpolate(grey, size=side, mode="bilinear", antialias=True)
        return grey.flatten(1)


class LogisticRegression(ImageClassifier):
    """One linear layer on grey pixels. The weights start at zero."""

    kind: ClassVar[str] = "pixel-logistic"
    head_name: ClassVar[str] = "classifier"
    supports_gradient_checkpointing: ClassVar[bool] = False

    def __init__(self, labels: int, side: int = 28) -> None:
        super().__init__(side=side)
        self.pixels = GreyPixels(side)
        self.classifier = nn.Linear(side**2, labels)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def stages(self) -> list[nn.Module]:
        """Return the whole model as one stage."""
        return [nn.Sequential(self.pixels, self.classifier)]
