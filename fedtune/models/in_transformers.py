"""fedtune's image models as transformers models. ``save_pretrained`` saves the code beside the weights."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from .kinds import IMAGE_MODEL_CLASSES

__all__ = ["FedtuneForImageClassification", "FedtuneImageConfig"]


class FedtuneImageConfig(PretrainedConfig):
    """``kind`` names the model; ``settings`` are its arguments besides the number of labels."""

    model_type = "fedtune-image-classifier"

    def __init__(self, kind: str = "pixel-logistic", settings: dict[str, Any] | None = None, **others: Any) -> None:
        super().__init__(**others)
        self.kind = kind
        self.settings = settings or {}


class FedtuneForImageClassification(PreTrainedModel):
    """A transformers model that wraps one of fedtune's image models as ``model``."""

    config_class = FedtuneImageConfig
    main_input_name = "pixel_values"
    base_model_prefix = "model"

    def __init__(self, config: FedtuneImageConfig) -> None:
        super().__init__(config)
        self.model = IMAGE_MODEL_CLASSES[config.kind](config.num_labels, **config.settings)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Return the logits [n, labels], and the mean loss if labels are given: [n], or [n, labels] of zeros and ones
        for several classes per image.
        """
        logits = self.model(pixel_values).logits
        if labels is None:
            return ImageClassifierOutput(logits=logits)
        several = self.config.problem_type == "multi_label_classification"
        compute = F.binary_cross_entropy_with_logits if several else F.cross_entropy
        return ImageClassifierOutput(loss=compute(logits, labels), logits=logits)


FedtuneImageConfig.register_for_auto_class()
FedtuneForImageClassification.register_for_auto_class("AutoModelForImageClassification")
AutoConfig.register(FedtuneImageConfig.model_type, FedtuneImageConfig, exist_ok=True)
AutoModelForImageClassification.register(FedtuneImageConfig, FedtuneForImageClassification, exist_ok=True)
