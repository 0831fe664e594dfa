"""Activation pruning on nets whose convolutions normalise their weights."""

from typing import Any

import pytest
import torch
from torch import nn

from fedtune import models, techniques
from fedtune.errors import ModelError
from fedtune.models.mobilenet_v3 import MobileNetV3
from fedtune.recipe.schema import ModelSettings, Unit
from tests.pruning_steps import a_step, pictures, prepared, resnet
from tests.technique_steps import IMAGES, logits


@pytest.mark.parametrize("joined", ["full+activation-pruning", "activation-pruning+full"])
def test_a_normalised_net_needs_no_batch_norm_and_keeps_less_than_half(joined: str) -> None:
    plain, chosen = prepared(resnet(), IMAGES, "full")
    pruned, pruning_chosen = prepared(resnet(), IMAGES, joined, normalise=True)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in pruned.modules())
    assert {n for n, p in pruned.named_parameters() if not p.requires_grad} == set()
    found, kept_bytes = a_step(pruned, pruning_chosen, pictures())
    assert found.keys() == set(dict(pruned.named_parameters()))
    assert kept_bytes < a_step(plain, chosen, pictures())[1] / 2


def test_normalise_is_refused_where_it_would_rescale_what_stays_frozen() -> None:
    chosen = techniques.build_techniques(
        [Unit(name="head-only"), Unit(name="activation-pruning", settings={"normalise": True})]
    )
    with pytest.raises(
        ModelError, match=r"^activation-pruning's standardise_weights rescales conv1, which is frozen; train it"
    ):
        techniques.apply_techniques(chosen, resnet(), IMAGES, 0)


def test_a_folded_normalised_net_is_a_plain_one_of_the_same_function() -> None:
    model, chosen = prepared(resnet(), IMAGES, "full+activation-pruning", normalise=True)
    wanted = logits(model, pictures())
    for technique in chosen:
        technique.merge_into_weights(model)
    plain = resnet()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(plain, pictures()), wanted, rtol=1e-4, atol=1e-4)


def test_dynamic_pruning_masks_normalised_convolutions_and_sees_gradients_of_what_is_inactive() -> None:
    for joined in ("dynamic-pruning+activation-pruning", "activation-pruning+dynamic-pruning"):
        model, chosen = prepared(MobileNetV3(3), IMAGES, joined, normalise=True)
        name = "features.12.0"
        layer: Any = model.get_submodule(name)
        inactive = layer.mask == 0
        found, _ = a_step(model, chosen, pictures())
        assert found[f"{name}.weight"][inactive].any()
        x = torch.ones(1, 96, 2, 2).normal_()
        out = layer(x)
        layer.weight.data[inactive] = 7
        assert torch.equal(layer(x), out)
        layer.weight.data[~inactive] += torch.randn(int((~inactive).sum()))
        assert not torch.equal(layer(x), out)


@pytest.mark.parametrize("joined", ["dynamic-pruning+activation-pruning", "activation-pruning+dynamic-pruning"])
def test_a_masked_normalised_net_folds_to_a_plain_one_though_active_weights_are_zero(joined: str) -> None:
    model, chosen = prepared(MobileNetV3(3), IMAGES, joined, normalise=True)
    layer: Any = model.get_submodule("features.12.0")
    layer.weight.data[tuple(layer.mask.nonzero()[0])] = 0  # as a weight that has just been grown
    wanted = logits(model, pictures())
    for technique in chosen:
        technique.merge_into_weights(model)
    plain = MobileNetV3(3)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(plain, pictures()), wanted, rtol=1e-4, atol=1e-4)


def test_lite0_trains_normalised_from_its_own_sample() -> None:
    model = models.load_model(ModelSettings(source="sample:efficientnet-lite0"), IMAGES, ("a", "b", "c"), seed=0)
    model, chosen = prepared(model, IMAGES, "full+activation-pruning", normalise=True, values="half")
    found, _ = a_step(model, chosen, pictures())
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert sum(name.endswith(".gain") for name in found) == 49
