"""Image models that are not published as safetensors, converted once into the cache."""

from pathlib import Path
from typing import Any

import torch

from fedtune.errors import ChecksumError
from fedtune.files import hash_file
from fedtune.models import image_model_files
from fedtune.models.classifier import ImageClassifier
from fedtune.models.efficientnet_lite import EfficientNetLite
from fedtune.models.logistic import LogisticRegression
from fedtune.models.mobilenet_v2 import MobileNetV2
from fedtune.models.mobilenet_v3 import MobileNetV3
from fedtune.models.resnet import ResNet18
from fedtune.paths import get_cache_folder
from fedtune.sample_packages import make_folder_once

__all__ = [
    "UNTRAINED_MODELS",
    "convert_efficientnet_lite0",
    "make_logistic_regression_folder",
    "make_untrained_model_folder",
]

LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
UNTRAINED_MODELS: dict[str, tuple[type[ImageClassifier], dict[str, Any]]] = {
    "mobilenet-v2": (MobileNetV2, {}),
    "mobilenet-v3-small": (MobileNetV3, {}),
    "resnet18": (ResNet18, {}),
    "resnet18-small": (ResNet18, {"small": True}),
    "resnet18-narrow": (ResNet18, {"small": True, "width": 16}),
}
"""Models without pretrained weights in any package, with their settings."""


def convert_efficientnet_lite0(file: Path) -> Path:
    """Return the folder with the ImageNet weights of EfficientNet-Lite0.

    They were published only as a pickle. Its checksum is pinned, and only plain tensors are loaded from it.
    """
    if (found := hash_file(file)) != LITE0_SHA256:
        raise ChecksumError(f"{file.name} has sha256 {found}, but {LITE0_SHA256} was published; do not trust it")
    folder = get_cache_folder() / "image-models" / found
    make_folder_once(folder, lambda beside: _save_lite0(file, beside), f"the weights of {file.name}")
    return folder


def make_logistic_regression_folder() -> Path:
    """Return the folder of an untrained logistic regression: weights of zero and a placeholder head of two labels."""
    folder = get_cache_folder() / "image-models" / "logistic-28"
    make_folder_once(
        folder, lambda beside: image_model_files.save_image_model(LogisticRegression(2), beside), "sample:logistic"
    )
    return folder


def make_untrained_model_folder(name: str) -> Path:
    """Return the folder of a model without weights. Each load draws them from its own seed."""
    model, settings = UNTRAINED_MODELS[name]
    folder = get_cache_folder() / "image-models" / name
    make_folder_once(
        folder, lambda beside: image_model_files.save_untrained_config(model.kind, settings, beside), f"sample:{name}"
    )
    return folder


def _save_lite0(file: Path, into: Path) -> None:
    model = EfficientNetLite(1000)
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True), strict=True)
    image_model_files.save_image_model(model, into)
