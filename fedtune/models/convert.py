"""Image models that do not come as safetensors, put once into the cache."""

from pathlib import Path
from typing import Any

import torch

from fedtune.errors import ChecksumError
from fedtune.files import sha256
from fedtune.home import cache
from fedtune.models import own
from fedtune.models.classifier import ImageClassifier
from fedtune.models.efficientnet_lite import EfficientNetLite
from fedtune.models.logistic import Logistic
from fedtune.models.mobilenet_v2 import MobileNetV2
from fedtune.models.mobilenet_v3 import MobileNetV3
from fedtune.models.resnet import ResNet18
from fedtune.samples import keep

__all__ = ["UNTRAINED", "from_published_lite0", "logistic", "untrained"]

LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
UNTRAINED: dict[str, tuple[type[ImageClassifier], dict[str, Any]]] = {
    "mobilenet-v2": (MobileNetV2, {}),
    "mobilenet-v3-small": (MobileNetV3, {}),
    "resnet18": (ResNet18, {}),
    "resnet18-small": (ResNet18, {"small": True}),
    "resnet18-narrow": (ResNet18, {"small": True, "width": 16}),
}
"""Nets whose weights no package ships, with their settings."""


def from_published_lite0(file: Path) -> Path:
    """The folder with the ImageNet weights of EfficientNet-Lite0.

    They were only ever published as a pickle: it is read because its checksum is pinned, and as plain tensors only.
    """
    if (found := sha256(file)) != LITE0_SHA256:
        raise ChecksumError(f"{file.name} has sha256 {found}, but {LITE0_SHA256} was published; do not trust it")
    folder = cache() / "image-models" / found
    keep(folder, lambda beside: _save_lite0(file, beside), f"the weights of {file.name}")
    return folder


def logistic() -> Path:
    """The folder with an untrained logistic regression: all zero, with a head of two labels to be replaced."""
    folder = cache() / "image-models" / "logistic-28"
    keep(folder, lambda beside: own.save(Logistic(2), beside), "sample:logistic")
    return folder


def untrained(name: str) -> Path:
    """The folder of a net whose weights every load draws from its own seed."""
    model, settings = UNTRAINED[name]
    folder = cache() / "image-models" / name
    keep(folder, lambda beside: own.save_untrained(model.kind, settings, beside), f"sample:{name}")
    return folder


def _save_lite0(file: Path, into: Path) -> None:
    model = EfficientNetLite(1000)
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True), strict=True)
    own.save(model, into)
