"""EfficientNet-Lite0 as a transformers model: inverted residual blocks with ReLU6 and no squeeze-excite.

Self-contained, so that ``save_pretrained`` can ship this file beside the weights. The module names are those of the
published checkpoint. Blocks and scaling: Tan & Le 2019, "EfficientNet"; the Lite variant: TensorFlow TPU team 2020.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ImageClassifierOutput

__all__ = ["EfficientNetLiteConfig", "EfficientNetLiteForImageClassification"]

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


class EfficientNetLiteConfig(PretrainedConfig):
    """Lite0 has no free dimension but the number of labels."""

    model_type = "efficientnet-lite"

    def __init__(self, dropout: float = 0.2, **settings: Any) -> None:
        super().__init__(**settings)
        self.dropout = dropout


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


class InvertedResidual(GradientCheckpointingLayer):
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


class EfficientNetLiteForImageClassification(PreTrainedModel):
    """Input: pixel_values [n, 3, h, w], scaled as (pixel - 127) / 128."""

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self._conv_stem = SameConv2d(3, 32, 3, 2)
        self._bn0 = _norm(32)
        self._blocks = _blocks()
        self._conv_head = nn.Conv2d(320, 1280, 1, bias=False)
        self._bn1 = _norm(1280)
        self._dropout = nn.Dropout(config.dropout)
        self._fc = nn.Linear(1280, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> ImageClassifierOutput:
        """Logits [n, labels], and the mean cross-entropy when labels [n] are given."""
        x = F.relu6(self._bn0(self._conv_stem(pixel_values)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        logits = self._fc(self._dropout(x.mean(dim=(2, 3))))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.uniform_(module.weight, -(module.in_features**-0.5), module.in_features**-0.5)
            nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)


EfficientNetLiteConfig.register_for_auto_class()
EfficientNetLiteForImageClassification.register_for_auto_class("AutoModelForImageClassification")
AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
AutoModelForImageClassification.register(EfficientNetLiteConfig, EfficientNetLiteForImageClassification, exist_ok=True)
