"""ResNet-18: He et al. 2016, "Deep Residual Learning for Image Recognition", table 1 with projections (option B).

Module names are those of torchvision, so its checkpoints can be loaded.
"""

from typing import ClassVar

from torch import Tensor, nn

from .classifier import ImageClassifier
from .layers import GlobalAveragePool, init_weights, make_conv_norm

__all__ = ["BasicBlock", "ResNet18"]


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with a residual connection, which has a projection if the shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        projects = stride > 1 or inputs != outputs
        self.downsample = make_conv_norm(inputs, outputs, stride=stride) if projects else nn.Identity()
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Run the block: [n, inputs, h, w] -> [n, outputs, h', w']."""
        inner = self.relu1(self.bn1(self.conv1(x)))
        out: Tensor = self.relu2(self.bn2(self.conv2(inner)) + self.downsample(x))
        return out


class ResNet18(ImageClassifier):
    """ResNet-18 for pixels [n, 3, h, w].

    ``small`` makes the stem keep the image size, as is usual for images of up to 32 pixels. ``width`` is the number of
    channels of the first blocks, 64 in the paper.
    """

    kind: ClassVar[str] = "resnet18"
    head_name: ClassVar[str] = "fc"

    def __init__(self, labels: int, small: bool = False, width: int = 64) -> None:
        super().__init__(small=small, width=width)
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False) if small else nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        self.layer1 = _pair(width, width, 1)
        self.layer2 = _pair(width, 2 * width, 2)
        self.layer3 = _pair(2 * width, 4 * width, 2)
        self.layer4 = _pair(4 * width, 8 * width, 2)
        self.pool = GlobalAveragePool()
        self.fc = nn.Linear(8 * width, labels)
        init_weights(self)

    def stages(self) -> list[nn.Module]:
        """Return the stages: stem, 8 blocks, classifier."""
        stem = nn.Sequential(self.conv1, self.bn1, self.relu, self.maxpool)
        blocks = [*self.layer1, *self.layer2, *self.layer3, *self.layer4]
        return [stem, *blocks, nn.Sequential(self.pool, self.fc)]


def _pair(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs))
