"""MobileNetV2, width 1.0: Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", table 2.

Module names and norm constants are those of torchvision, so its checkpoints can be loaded.
"""

from typing import ClassVar

from torch import nn

from .classifier import ImageClassifier
from .inverted_residual import InvertedResidual
from .layers import GlobalAveragePool, flatten_layers, init_weights, make_conv_norm

__all__ = ["MobileNetV2", "V2Block"]

# expansion, channels out, blocks, stride of the first block
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class V2Block(InvertedResidual):
    """An inverted residual block with ReLU6 after the first two convolutions.

    Without expansion it has no first convolution.
    """

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__(adds_input=stride == 1 and inputs == outputs)
        hidden = inputs * expansion
        widen = [make_conv_norm(inputs, hidden, activation=nn.ReLU6)] if expansion > 1 else []
        spread = make_conv_norm(hidden, hidden, 3, stride, groups=hidden, activation=nn.ReLU6)
        self.conv = nn.Sequential(*widen, spread, *make_conv_norm(hidden, outputs))

    def layers(self) -> list[nn.Module]:
        """Return the layers: expand, depthwise convolution, project."""
        return flatten_layers(self.conv)


class MobileNetV2(ImageClassifier):
    """MobileNetV2 for pixels [n, 3, h, w]. The last feature map has 1/32 of their side."""

    kind: ClassVar[str] = "mobilenet-v2"
    head_name: ClassVar[str] = "classifier.1"

    def __init__(self, labels: int, dropout: float = 0.2) -> None:
        super().__init__(dropout=dropout)
        head = make_conv_norm(320, 1280, activation=nn.ReLU6)
        self.features = nn.Sequential(make_conv_norm(3, 32, 3, 2, activation=nn.ReLU6), *_blocks(), head)
        self.pool = GlobalAveragePool()
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(1280, labels))
        init_weights(self)

    def stages(self) -> list[nn.Module]:
        """Return the stages: stem, 17 blocks, head convolution, classifier."""
        return [*self.features, nn.Sequential(self.pool, *self.classifier)]


def _blocks() -> list[V2Block]:
    blocks, inputs = [], 32
    for expansion, outputs, count, stride in STAGES:
        for index in range(count):
            blocks.append(V2Block(inputs, outputs, expansion, 1 if index else stride))
            inputs = outputs
    return blocks
