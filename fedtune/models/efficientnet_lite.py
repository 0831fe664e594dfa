"""EfficientNet-Lite0: inverted residual blocks with ReLU6 and no squeeze-excite.

The module names are those of the published checkpoint. Blocks and scaling: Tan & Le 2019, "EfficientNet"; the Lite
variant: TensorFlow TPU team 2020.
"""

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .classifier import ImageClassifier

__all__ = ["EfficientNetLite", "SameConv2d"]

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
    """A convolution padded as TensorFlow's "same": with stride 2 the odd pixel goes to the bottom right."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name nn.Conv2d gives it
        """[n, c, h, w] -> [n, c', ceil(h / stride), ceil(w / stride)]."""
        if self.stride[0] > 1:
            input = F.pad(input, (*self._missing(input.shape[-1]), *self._missing(input.shape[-2])))  # noqa: A001
        return super().forward(input)

    def _missing(self, size: int) -> tuple[int, int]:
        kernel, stride = self.kernel_size[0], self.stride[0]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow again; add the input where the shapes allow it."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv = nn.Conv2d(inputs, hidden, 1, bias=False)
            self._bn0 = _norm(hidden)
        self._depthwise_conv = SameConv2d(hidden, hidden, kernel, stride, groups=hidden)
        self._bn1 = _norm(hidden)
        self._project_conv = nn.Conv2d(hidden, outputs, 1, bias=False)
        self._bn2 = _norm(outputs)
        self.adds_input = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, h, w] -> [n, outputs, h', w']."""
        hidden = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        hidden = F.relu6(self._bn1(self._depthwise_conv(hidden)))
        out: Tensor = self._bn2(self._project_conv(hidden))
        return x + out if self.adds_input else out


def _blocks() -> nn.ModuleList:
    blocks, inputs = nn.ModuleList(), 32
    for expansion, kernel, stride, outputs, count in STAGES:
        for index in range(count):
            blocks.append(InvertedResidual(inputs, outputs, expansion, kernel, 1 if index else stride))
            inputs = outputs
    return blocks


class EfficientNetLite(ImageClassifier):
    """Input: pixels [n, 3, h, w], scaled as (pixel - 127) / 128. Lite0 has no free dimension but the labels."""

    kind: ClassVar[str] = "efficientnet-lite"
    head: ClassVar[str] = "_fc"
    supports_gradient_checkpointing = True

    def __init__(self, labels: int, dropout: float = 0.2) -> None:
        super().__init__(dropout=dropout)
        self._conv_stem = SameConv2d(3, 32, 3, 2)
        self._bn0 = _norm(32)
        self._blocks = _blocks()
        self._conv_head = nn.Conv2d(320, 1280, 1, bias=False)
        self._bn1 = _norm(1280)
        self._dropout = nn.Dropout(dropout)
        self._fc = nn.Linear(1280, labels)
        self._checkpointed = False

    def activation_checkpointing_enable(self, _: Any = None) -> None:
        """Keep each block's input only, from now on."""
        self._checkpointed = True

    def logits(self, pixels: Tensor) -> Tensor:
        """[n, 3, h, w] -> [n, labels]."""
        x = F.relu6(self._bn0(self._conv_stem(pixels)))
        for block in self._blocks:
            x = checkpoint(block, x, use_reentrant=False) if self._checkpointed and self.training else block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        out: Tensor = self._fc(self._dropout(x.mean(dim=(2, 3))))
        return out
