"""Image models defined here, by their kind, and pictures for them."""

from typing import Any

import torch
from torch import Tensor

from fedtune.models.classifier import ImageClassifier
from fedtune.models.kinds import IMAGE_MODEL_CLASSES

__all__ = ["net", "pictures"]


def net(kind: str, labels: int = 10, **settings: Any) -> ImageClassifier:
    torch.manual_seed(0)
    return IMAGE_MODEL_CLASSES[kind](labels, **settings).eval()


def pictures(count: int = 2, side: int = 32) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))
