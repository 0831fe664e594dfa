"""Small nets of inverted residual blocks, as if pretrained, and batches for them."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification, PreTrainedModel

from fedtune.models.classifier import ImageClassifier
from fedtune.models.efficientnet_lite import LiteBlock
from fedtune.models.layers import GlobalAveragePool, make_conv_norm
from fedtune.models.mobilenet_v3 import V3Block

__all__ = ["SmallNet", "age", "gradients", "hard_net", "in_transformers", "pictures", "switched_on"]

SHAPES = ((1, 3, 1, 8), (3, 5, 2, 12), (6, 3, 1, 12), (2, 5, 2, 16), (4, 3, 1, 16))
"""Expansion, kernel, stride and channels out of each block."""


class SmallNet(ImageClassifier):
    """A stem, five blocks of ReLU6 with and without expansion, both strides, a head and a classifier for three."""

    kind: ClassVar[str] = "small"
    head_name: ClassVar[str] = "fc"

    def __init__(self, blocks: Iterable[nn.Module] | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = make_conv_norm(3, 8, 3, 2, activation=nn.ReLU6)
        self.blocks = nn.Sequential(*(_lite_blocks() if blocks is None else blocks))
        self.top = make_conv_norm(16, 24, activation=nn.ReLU6)
        self.pool = GlobalAveragePool()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(24, 3)

    def stages(self) -> list[nn.Module]:
        return [self.stem, *self.blocks, self.top, nn.Sequential(self.pool, self.dropout, self.fc)]


def _lite_blocks() -> Iterable[nn.Module]:
    inputs = 8
    for expansion, kernel, stride, outputs in SHAPES:
        yield LiteBlock(inputs, outputs, expansion, kernel, stride)
        inputs = outputs


def hard_net() -> SmallNet:
    """Three blocks of hard-swish, the last two with squeeze-excite."""
    shapes = ((8, 16, 12, False), (12, 24, 12, True), (12, 24, 16, True))
    return SmallNet([V3Block(i, h, o, 3, 1, nn.Hardswish, squeezes=gate) for i, h, o, gate in shapes])


def in_transformers() -> PreTrainedModel:
    """MobileNetV2 of a quarter's width, which pads as TensorFlow does."""
    torch.manual_seed(0)
    config = MobileNetV2Config(depth_multiplier=0.25, hidden_act="relu6")
    config.num_labels = 3
    made: PreTrainedModel = MobileNetV2ForImageClassification(config)
    return made


Net = Any
"""A model that takes ``pixel_values`` and ``labels``: typing knows no module by what it is called with."""


def age(model: Net, seed: int = 0) -> Net:
    """Weights, scales, shifts and statistics as training leaves them, in evaluation mode."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        spread = 0.3 if parameter.dim() == 1 else (2 / parameter[0].numel()) ** 0.5
        parameter.data = float(name.endswith("weight") and parameter.dim() == 1) + spread * torch.randn(
            parameter.shape, generator=random
        )
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None:
            layer.running_mean.copy_(0.5 * torch.randn(layer.num_features, generator=random))
            layer.running_var.copy_(0.5 + torch.rand(layer.num_features, generator=random))
    return model.eval()


def pictures(rows: int = 6, side: int = 32, seed: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    pixels = torch.randn(rows, 3, side, side, generator=random).to(dtype)
    return {"pixel_values": pixels, "labels": torch.randint(3, (rows,), generator=random)}


def switched_on(model: Net, names: Iterable[str]) -> Net:
    """The untouched net with gradients of some parameters."""
    model.requires_grad_(False)
    parameters = dict(model.named_parameters())
    for name in names:
        if name in parameters:
            parameters[name].requires_grad_(True)
    return model


def gradients(model: Net, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a step in the mode the model is in."""
    model.zero_grad()
    torch.manual_seed(3)
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
