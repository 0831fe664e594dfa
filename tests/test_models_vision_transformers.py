"""Convolutional nets of transformers, from a folder through a client's first step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    EfficientNetConfig,
    EfficientNetForImageClassification,
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from fedtune import models
from fedtune.data.pixels import EncodedPictures
from fedtune.recipe.preprocessor_settings import Preprocessor
from fedtune.recipe.schema import ModelSettings
from fedtune.training import ClientRound, get_model_state, prepare_model, train_local_model
from tests.data_examples import a_recipe
from tests.technique_steps import IMAGES

SEVEN = tuple("abcdefg")
LABELS: dict[str, Any] = {"num_labels": len(SEVEN)}


def mobilenet_v1() -> PreTrainedModel:
    config = MobileNetV1Config(depth_multiplier=0.25, classifier_dropout_prob=0.0, **LABELS)
    return MobileNetV1ForImageClassification(config)


def mobilenet_v2() -> PreTrainedModel:
    config = MobileNetV2Config(depth_multiplier=0.25, classifier_dropout_prob=0.0, **LABELS)
    return MobileNetV2ForImageClassification(config)


def resnet() -> PreTrainedModel:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", **LABELS)
    return ResNetForImageClassification(config)


def efficientnet() -> PreTrainedModel:
    config = EfficientNetConfig(
        width_coefficient=0.25,
        depth_coefficient=0.25,
        hidden_dim=320,
        dropout_rate=0.0,
        drop_connect_rate=0.0,
        **LABELS,
    )
    return EfficientNetForImageClassification(config)


every_net = pytest.mark.parametrize("build", [mobilenet_v1, mobilenet_v2, resnet, efficientnet])


def saved(build: Callable[[], PreTrainedModel], folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    model = build()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None:
            layer.running_mean.uniform_(-0.1, 0.1)
    model.save_pretrained(folder)
    model.eval()
    return model


def some_pictures() -> EncodedPictures:
    random = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (4, 3, 32, 32), generator=random, dtype=torch.uint8)
    return EncodedPictures(pixels, Preprocessor(side=32), torch.tensor([0, 3, 6, 3]), None)


def by_hand(model: nn.Module, batch: dict[str, Tensor], lr: float) -> dict[str, Tensor]:
    """What one step of gradient descent adds, with the norms' statistics fixed."""
    model(**batch).loss.backward()
    return {name: -lr * parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@every_net
def test_a_net_of_transformers_takes_the_step_that_plain_torch_takes(
    build: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    published, pictures = saved(build, tmp_path / "net"), some_pictures()
    recipe = a_recipe(
        "task=image-classification",
        f"model.source=path:{tmp_path / 'net'}",
        "train={techniques: full, optimiser: sgd, lr: 0.01, weight_decay: 0, clip: null, batch: 4, steps: 1}",
        "train.image_size=32",
    )
    model, techniques, names = prepare_model(recipe, SEVEN)
    outcome = train_local_model(
        ClientRound(model, techniques, recipe, pictures, np.arange(4), 1, 0), get_model_state(model, names)
    )
    expected = by_hand(published, pictures.make_batch(range(4)), 0.01)
    assert outcome.delta.keys() == expected.keys()
    for name, delta in outcome.delta.items():
        torch.testing.assert_close(delta, expected[name], rtol=1e-3, atol=1e-6)
    assert all(torch.equal(buffer, model.get_buffer(name)) for name, buffer in published.named_buffers())


@every_net
def test_only_the_head_is_new_for_other_labels(build: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    published = saved(build, tmp_path / "net").state_dict()
    loaded = models.load_model(ModelSettings(source=f"path:{tmp_path / 'net'}"), IMAGES, ("yes", "no"), seed=0)
    new = [name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, published[name])]
    assert {name.split(".")[0] for name in new} == {"classifier"}
    assert loaded(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 2)
