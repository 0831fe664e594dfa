"""fedtune's image models by the kind in their configuration."""

from collections.abc import Callable

from .classifier import ImageClassifier
from .efficientnet_lite import EfficientNetLite
from .logistic import LogisticRegression
from .mobilenet_v2 import MobileNetV2
from .mobilenet_v3 import MobileNetV3
from .resnet import ResNet18

__all__ = ["IMAGE_MODEL_CLASSES"]

IMAGE_MODEL_CLASSES: dict[str, Callable[..., ImageClassifier]] = {
    model.kind: model for model in (EfficientNetLite, LogisticRegression, MobileNetV2, MobileNetV3, ResNet18)
}
