"""MobileNetV3-small, width 1.0: Howard et al. 2019, "Searching for MobileNetV3", table 2.

Module names are those of torchvision, so its checkpoints can be loaded. As in torchvision, and unlike the table, the
last convolution before pooling has no squeeze-and-excitation.
"""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from .classifier import ImageClassifier
from .inverted_residual import InvertedResidual
from .layers import GlobalAveragePool, flatten_layers, init_weights, make_conv_norm

__all__ = ["MobileNetV3", "SqueezeExcite", "V3Block"]

# kernel, hidden channels, output channels, squeeze-and-excitation, activation, stride
BLOCKS: tuple[tuple[int, int, int, bool, Callable[[], nn.Module], int], ...] = (
    (3, 16, 16, True, nn.ReLU, 2),
    (3, 72, 24, False, nn.ReLU, 2),
    (3, 88, 24, False, nn.ReLU, 1),
    (5, 96, 40, True, nn.Hardswish, 2),
    (5, 240, 40, True, nn.Hardswish, 1),
    (5, 240, 40, True, nn.Hardswish, 1),
    (5, 120, 48, True, nn.Hardswish, 1),
    (5, 144, 48, True, nn.Hardswish, 1),
    (5, 288, 96, True, nn.Hardswish, 2),
    (5, 576, 96, True, nn.Hardswish, 1),
    (5, 576, 96, True, nn.Hardswish, 1),
)
_norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)


class SqueezeExcite(nn.Module):
    """Multiplies each channel by a gate in 0..1 computed from the means of all channels.

    Section 5.3, after Hu et al. 2018.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = _divisible(channels // 4)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.activation = nn.ReLU()
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.scale_activation = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels: [n, c, h, w] -> [n, c, h, w]."""
        squeezed = self.activation(self.fc1(x.mean(dim=(2, 3), keepdim=True)))
        gate: Tensor = self.scale_activation(self.fc2(squeezed))
        return x * gate


class V3Block(InvertedResidual):
    """An inverted residual block with optional squeeze-and-excitation before the projection.

    It expands only if the number of hidden channels differs from the input's.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        kernel: int,
        stride: int,
        activation: Callable[[], nn.Module],
        *,
        squeezes: bool,
    ) -> None:
        super().__init__(adds_input=stride == 1 and inputs == outputs)
        widen = [make_conv_norm(inputs, hidden, norm=_norm, activation=activation)] if hidden != inputs else []
        spread = make_conv_norm(hidden, hidden, kernel, stride, groups=hidden, norm=_norm, activation=activation)
        gate = [SqueezeExcite(hidden)] if squeezes else []
        self.block = nn.Sequential(*widen, spread, *gate, make_conv_norm(hidden, outputs, norm=_norm))

    def layers(self) -> list[nn.Module]:
        """Return the layers: expand, depthwise convolution, squeeze-and-excitation, project."""
        return flatten_layers(self.block)


class MobileNetV3(ImageClassifier):
    """MobileNetV3-small for pixels [n, 3, h, w]. The last feature map has 1/32 of their side."""

    kind: ClassVar[str] = "mobilenet-v3-small"
    head_name: ClassVar[str] = "classifier.3"

    def __init__(self, labels: int, dropout: float = 0.2) -> None:
        super().__init__(dropout=dropout)
        stem = make_conv_norm(3, 16, 3, 2, norm=_norm, activation=nn.Hardswish)
        head = make_conv_norm(96, 576, norm=_norm, activation=nn.Hardswish)
        self.features = nn.Sequential(stem, *_blocks(), head)
        self.pool = GlobalAveragePool()
        self.classifier = nn.Sequential(
            nn.Linear(576, 1024), nn.Hardswish(), nn.Dropout(dropout), nn.Linear(1024, labels)
        )
        init_weights(self)

    def stages(self) -> list[nn.Module]:
        """Return the stages: stem, 11 blocks, head convolution, classifier."""
        return [*self.features, nn.Sequential(self.pool, *self.classifier)]


def _blocks() -> list[V3Block]:
    blocks, inputs = [], 16
    for kernel, hidden, outputs, squeezes, activation, stride in BLOCKS:
        blocks.append(V3Block(inputs, hidden, outputs, kernel, stride, activation, squeezes=squeezes))
        inputs = outputs
    return blocks


def _divisible(channels: int) -> int:
    """Return the nearest multiple of 8 that is at least 8 and at least 0.9 times ``channels``."""
    rounded = max(8, (channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8
