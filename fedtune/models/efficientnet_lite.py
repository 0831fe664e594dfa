"""EfficientNet-Lite0: inverted residual blocks with ReLU6 and without squeeze-and-excitation.

The module names are those of the published checkpoint. Blocks and scaling: Tan & Le 2019, "EfficientNet"; the Lite
variant: TensorFlow TPU team 2020.
"""

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from .classifier import ImageClassifier
from .inverted_residual import InvertedResidual
from .layers import GlobalAveragePool

__all__ = ["EfficientNetLite", "LiteBlock", "SameConv2d"]

# expansion, kernel, stride of the first block, channels out, blocks
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding.

    With stride 2, an odd pixel of padding goes to the bottom right.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the parameter's name in nn.Conv2d
        """[n, c, h, w] -> [n, c', ceil(h / stride), ceil(w / stride)]."""
        if any(margins := self.compute_same_padding(*input.shape[-2:])):
            input = F.pad(input, margins)  # noqa: A001
        return super().forward(input)

    def compute_same_padding(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the zero padding that is added besides ``padding``: left, right, top, bottom."""
        return (*self._missing(width), *self._missing(height)) if self.stride[0] > 1 else (0, 0, 0, 0)

    def _missing(self, size: int) -> tuple[int, int]:
        kernel, stride = self.kernel_size[0], self.stride[0]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class LiteBlock(InvertedResidual):
    """An inverted residual block with ReLU6 after the first two convolutions.

    Without expansion it has no first convolution.
    """

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__(adds_input=stride == 1 and inputs == outputs)
        hidden = inputs * expansion
        self.has_expansion = expansion > 1
        if self.has_expansion:
            self._expand_conv = nn.Conv2d(inputs, hidden, 1, bias=False)
            self._bn0 = _norm(hidden)
            self._relu0 = nn.ReLU6()
        self._depthwise_conv = SameConv2d(hidden, hidden, kernel, stride, groups=hidden)
        self._bn1 = _norm(hidden)
        self._relu1 = nn.ReLU6()
        self._project_conv = nn.Conv2d(hidden, outputs, 1, bias=False)
        self._bn2 = _norm(outputs)

    def layers(self) -> list[nn.Module]:
        """Return the layers: expand, depthwise convolution, project."""
        widen = [self._expand_conv, self._bn0, self._relu0] if self.has_expansion else []
        return [*widen, self._depthwise_conv, self._bn1, self._relu1, self._project_conv, self._bn2]


def _blocks() -> nn.ModuleList:
    blocks, inputs = nn.ModuleList(), 32
    for expansion, kernel, stride, outputs, count in STAGES:
        for index in range(count):
            blocks.append(LiteBlock(inputs, outputs, expansion, kernel, 1 if index else stride))
            inputs = outputs
    return blocks


class EfficientNetLite(ImageClassifier):
    """EfficientNet-Lite0 for pixels [n, 3, h, w] scaled as (pixel - 127) / 128.

    Only the number of labels can be chosen.
    """

    kind: ClassVar[str] = "efficientnet-lite"
    head_name: ClassVar[str] = "_fc"

    def __init__(self, labels: int, dropout: float = 0.2) -> None:
        super().__init__(dropout=dropout)
        self._conv_stem = SameConv2d(3, 32, 3, 2)
        self._bn0 = _norm(32)
        self._relu0 = nn.ReLU6()
        self._blocks = _blocks()
        self._conv_head = nn.Conv2d(320, 1280, 1, bias=False)
        self._bn1 = _norm(1280)
        self._relu1 = nn.ReLU6()
        self._pool = GlobalAveragePool()
        self._dropout = nn.Dropout(dropout)
        self._fc = nn.Linear(1280, labels)

    def stages(self) -> list[nn.Module]:
        """Return the stages: stem, 16 blocks, head convolution, classifier."""
        stem = nn.Sequential(self._conv_stem, self._bn0, self._relu0)
        head = nn.Sequential(self._conv_head, self._bn1, self._relu1)
        return [stem, *self._blocks, head, nn.Sequential(self._pool, self._dropout, self._fc)]
