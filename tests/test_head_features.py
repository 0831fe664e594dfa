"""Features of the head: with the head's weights they give the model's logits, for models of every kind."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from fedtune.continual._head_features import find_head_layer, hash_backbone, iter_features
from fedtune.errors import ModelError
from fedtune.models.efficientnet_lite import EfficientNetLite
from fedtune.models.logistic import LogisticRegression
from fedtune.models.mobilenet_v3 import MobileNetV3
from fedtune.models.resnet import ResNet18
from tests.tiny import bert, few_texts, llama_classifier

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
}

LABELS: dict[str, Any] = {"pad_token_id": 0, "num_labels": 3}


def roberta() -> PreTrainedModel:
    return RobertaForSequenceClassification(RobertaConfig(**SMALL, **LABELS))


def distilbert() -> PreTrainedModel:
    shape: dict[str, Any] = {
        "vocab_size": 50,
        "dim": 16,
        "hidden_dim": 32,
        "n_heads": 2,
        "n_layers": 1,
        "num_labels": 3,
    }
    return DistilBertForSequenceClassification(DistilBertConfig(**shape))


def gpt2() -> PreTrainedModel:
    shape: dict[str, Any] = {"vocab_size": 50, "n_embd": 16, "n_head": 2, "n_layer": 1, "num_labels": 3}
    return GPT2ForSequenceClassification(GPT2Config(**shape, pad_token_id=0))


def vit() -> PreTrainedModel:
    shape: dict[str, Any] = {name: value for name, value in SMALL.items() if name != "vocab_size"}
    shape |= {"image_size": 32, "patch_size": 16, "num_labels": 3}
    return ViTForImageClassification(ViTConfig(**shape))


class FewPictures:
    """Five random pictures."""

    domains: list[str] | None = None
    lengths: Tensor | None = None

    def __len__(self) -> int:
        return 5

    def make_batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        pixels = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        return {"pixel_values": pixels[list(indices)], "labels": torch.tensor(list(indices)) % 3}


TEXTS: list[Callable[[], nn.Module]] = [bert, llama_classifier, roberta, distilbert, gpt2]
PICTURES: list[Callable[[], nn.Module]] = [
    vit,
    lambda: ResNet18(3, small=True, width=4),
    lambda: EfficientNetLite(3),
    lambda: MobileNetV3(3),
    lambda: LogisticRegression(3),
]


@pytest.mark.parametrize("build", TEXTS + PICTURES)
def test_features_and_head_give_the_logits_of_the_model(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build().train()
    examples: Any = few_texts() if build in TEXTS else FewPictures()
    name, layer = find_head_layer(model)
    nn.init.normal_(layer.weight)
    rows = list(range(min(5, len(examples))))
    features, labels = (torch.cat(one) for one in zip(*iter_features(model, (), examples, rows, 5), strict=True))
    assert model.training
    assert model.get_submodule(name) is layer
    batch = examples.make_batch(rows)
    assert torch.equal(labels, batch.pop("labels"))
    with torch.no_grad():
        wanted = model.eval()(**batch).logits
    found = nn.functional.linear(features, layer.weight, layer.bias)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert features.shape == (len(rows), layer.in_features)


def test_a_digest_follows_every_tensor_but_those_of_the_head() -> None:
    model = bert()
    start = hash_backbone(model, {})
    name, layer = find_head_layer(model)
    assert torch.equal(start, hash_backbone(model, {f"{name}.weight": torch.zeros_like(layer.weight)}))
    other = next(key for key, _ in model.named_parameters() if not key.startswith(f"{name}."))
    changed = {other: dict(model.named_parameters())[other].detach() + 1e-6}
    assert not torch.equal(start, hash_backbone(model, changed))
    assert np.array_equal(start.numpy(), hash_backbone(bert(), {}).numpy())


def test_a_model_without_a_linear_head_is_refused() -> None:
    with pytest.raises(ModelError, match="does not end in a linear layer"):
        find_head_layer(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)))
