"""Multinomial logistic regression on raw pixels: the smallest honest model, for baselines and engine benchmarks.

Self-contained, so that ``save_pretrained`` can ship this file beside the weights.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

__all__ = ["LogisticConfig", "LogisticForImageClassification"]


class LogisticConfig(PretrainedConfig):
    """``side``: images are scaled to side x side pixels, so the model has side² inputs."""

    model_type = "pixel-logistic"

    def __init__(self, side: int = 28, **settings: Any) -> None:
        super().__init__(**settings)
        self.side = side


class LogisticForImageClassification(PreTrainedModel):
    """Input: pixel_values [n, c, h, w]; the channels are averaged. The weights start at zero."""

    config_class = LogisticConfig
    main_input_name = "pixel_values"

    def __init__(self, config: LogisticConfig) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(config.side**2, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> ImageClassifierOutput:
        """Logits [n, labels], and the mean cross-entropy when labels [n] are given."""
        side = (self.config.side, self.config.side)
        grey = pixel_values.mean(dim=1, keepdim=True)
        if grey.shape[-2:] != side:
            grey = F.interpolate(grey, size=side, mode="bilinear", antialias=True)
        logits = self.classifier(grey.flatten(1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


LogisticConfig.register_for_auto_class()
LogisticForImageClassification.register_for_auto_class("AutoModelForImageClassification")
AutoConfig.register(LogisticConfig.model_type, LogisticConfig, exist_ok=True)
AutoModelForImageClassification.register(LogisticConfig, LogisticForImageClassification, exist_ok=True)
