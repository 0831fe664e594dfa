"""Activation pruning on whole models, beside what trains them."""

import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedtune import techniques
from fedtune.errors import ModelError, RecipeError
from fedtune.models.mobilenet_v2 import MobileNetV2
from fedtune.recipe.schema import Unit
from fedtune.tasks import Task
from fedtune.training import ClientRound, get_model_state, train_local_model
from tests.pruning_steps import Pruning, a_step, pictures, prepared, resnet
from tests.technique_steps import IMAGES, LANGUAGE, TEXT, logits
from tests.tiny import a_training_recipe, bert, few_texts, llama, texts

BUILDS: dict[str, tuple[Callable[[], Any], Task]] = {"bert": (bert, TEXT), "llama": (llama, LANGUAGE)}


@pytest.mark.parametrize("base", BUILDS)
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("pruning", [{}, {"per": "tensor", "values": "half"}, {"prune": 0.9, "centre": True}])
def test_beside_lora_all_gradients_but_those_of_a_are_those_without(base: str, number: int, pruning: Pruning) -> None:
    """dB and everything below follows from dense outputs; in round 1 A is frozen and so is all but the head exact."""
    build, task = BUILDS[base]
    plain, chosen = prepared(build(), task, "lora", number)
    pruned, pruning_chosen = prepared(build(), task, "lora+activation-pruning", number, **pruning)
    wanted, dense_bytes = a_step(plain, chosen, texts(plain))
    found, kept_bytes = a_step(pruned, pruning_chosen, texts(pruned))
    assert found.keys() == wanted.keys()
    approximate = {name for name in wanted if not torch.equal(found[name], wanted[name])}
    heads = {"classifier.weight"} & set(wanted)
    assert approximate == {name for name in wanted if ".lora_A." in name} | heads
    assert number == 1 or kept_bytes < dense_bytes


@pytest.mark.parametrize("base", BUILDS)
def test_beside_full_only_weights_of_linear_layers_are_approximated(base: str) -> None:
    build, task = BUILDS[base]
    plain, chosen = prepared(build(), task, "full")
    pruned, pruning_chosen = prepared(build(), task, "full+activation-pruning")
    wanted, dense_bytes = a_step(plain, chosen, texts(plain))
    found, kept_bytes = a_step(pruned, pruning_chosen, texts(pruned))
    linear = {f"{name}.weight" for name, layer in plain.named_modules() if isinstance(layer, nn.Linear)}
    assert {name for name in wanted if not torch.equal(found[name], wanted[name])} == linear
    assert kept_bytes < dense_bytes


def test_beside_full_only_weights_of_convolutions_and_the_head_are_approximated() -> None:
    plain, chosen = prepared(resnet(), IMAGES, "full")
    pruned, pruning_chosen = prepared(resnet(), IMAGES, "full+activation-pruning", prune=0.9)
    wanted, dense_bytes = a_step(plain, chosen, pictures())
    found, kept_bytes = a_step(pruned, pruning_chosen, pictures())
    layers = {f"{n}.weight" for n, layer in plain.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    assert {name for name in wanted if not torch.equal(found[name], wanted[name])} == layers
    assert kept_bytes < dense_bytes


@pytest.mark.parametrize("base", ["mobiletl", "last-blocks"])
def test_the_top_of_a_mobile_net_is_approximated_in_its_convolutions_alone(base: str) -> None:
    """Its lower part, which runs without a graph, is left as it was."""
    torch.manual_seed(0)
    net = MobileNetV2(3)
    for joined in (f"{base}+activation-pruning", f"activation-pruning+{base}"):
        plain, chosen = prepared(deepcopy(net), IMAGES, base)
        pruned, pruning_chosen = prepared(deepcopy(net), IMAGES, joined, prune=0.9)
        wanted, dense_bytes = a_step(plain, chosen, pictures())
        found, kept_bytes = a_step(pruned, pruning_chosen, pictures())
        modules = dict(plain.named_modules())
        layers = {n for n in wanted if isinstance(modules[n.rpartition(".")[0]], nn.Linear | nn.Conv2d)}
        different = {name for name in wanted if not torch.equal(found[name], wanted[name])}
        assert different == {name for name in layers if name.endswith("weight")}
        assert kept_bytes < dense_bytes / 2


@pytest.mark.parametrize("base", BUILDS)
@pytest.mark.parametrize("joined", ["lora", "full"])
def test_either_order_and_a_pickled_copy_train_to_the_same_bits(base: str, joined: str) -> None:
    build, task = BUILDS[base]
    outcomes = []
    for chain in (f"{joined}+activation-pruning", f"activation-pruning+{joined}"):
        model, chosen = prepared(build(), task, chain, prune=0.7)
        model.share_memory()
        names = techniques.list_trainable_tensors(model)
        for one in (pickle.loads(pickle.dumps(model)), deepcopy(model), model):
            recipe = a_training_recipe(local_steps=2, batch_size=3)
            data = few_texts(language=base == "llama")
            outcomes.append(
                train_local_model(
                    ClientRound(one, chosen, recipe, data, np.arange(8), 1, 1), get_model_state(one, names)
                )
            )
    first = outcomes[0].delta
    assert any(delta.any() for delta in first.values())
    for other in outcomes[1:]:
        assert all(torch.equal(other.delta[name], first[name]) for name in first)


@pytest.mark.parametrize("base", BUILDS)
@pytest.mark.parametrize("recomputing", ["gradient-checkpointing", "selective-checkpointing"])
def test_blocks_that_run_again_have_the_same_gradients_and_store_shared_inputs_once(
    base: str, recomputing: str
) -> None:
    build, task = BUILDS[base]
    stored, chosen = prepared(build(), task, "full+activation-pruning")
    again, again_chosen = prepared(build(), task, f"full+activation-pruning+{recomputing}")
    wanted, stored_bytes = a_step(stored, chosen, texts(stored))
    found, kept_bytes = a_step(again, again_chosen, texts(again))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert kept_bytes < stored_bytes


@pytest.mark.parametrize("settings", [{}, {"value_precision": "half"}, {"standardise_weights": True}])
def test_its_twin_stores_the_whole_and_is_the_network_without_it(settings: Pruning) -> None:
    [twin] = [
        one.make_reference()
        for one in techniques.build_techniques([Unit(name="full"), Unit(name="activation-pruning", settings=settings)])
        if one.name == "activation-pruning"
    ]
    assert twin is not None
    assert twin.model_dump() == {**twin.model_dump(), **settings, "pruned_fraction": 0.0, "value_precision": "full"}
    plain, chosen = prepared(bert(), TEXT, "full")
    whole, whole_chosen = prepared(bert(), TEXT, "full+activation-pruning", prune=0.0)
    wanted, wanted_bytes = a_step(plain, chosen, texts(plain))
    found, kept_bytes = a_step(whole, whole_chosen, texts(whole))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert kept_bytes == wanted_bytes


@pytest.mark.parametrize("joined", ["lora", "full"])
def test_folded_it_leaves_nothing_behind(joined: str) -> None:
    model, chosen = prepared(bert(), TEXT, f"{joined}+activation-pruning")
    wanted = logits(model, texts(model))
    for technique in chosen:
        technique.merge_into_weights(model)
    assert set(model.state_dict()) == set(bert().state_dict())
    assert not any("forward" in vars(layer) for layer in model.modules())
    torch.testing.assert_close(logits(model, texts(model)), wanted)


def test_only_an_untouched_function_can_be_carried_as_an_adapter() -> None:
    for settings, kept in (({}, True), ({"normalise": True}, False)):
        chosen = techniques.build_techniques([Unit(name="full"), Unit(name="activation-pruning", settings=settings)])
        assert chosen[1].has_unchanged_base() is kept


def test_a_model_without_such_layers_is_refused() -> None:
    chosen = techniques.build_techniques([Unit(name="full"), Unit(name="activation-pruning")])
    with pytest.raises(ModelError, match=r"^Embedding has no linear layer or convolution; leave the technique"):
        techniques.apply_techniques(chosen, nn.Embedding(3, 3), TEXT, 0)


@pytest.mark.parametrize("settings", [{"prune": 1.0}, {"prune": -0.1}, {"values": "eight"}, {"per": "layer"}])
def test_settings_out_of_bounds_are_refused(settings: Pruning) -> None:
    with pytest.raises(RecipeError, match=r"^train\.techniques, activation-pruning"):
        techniques.build_techniques([Unit(name="full"), Unit(name="activation-pruning", settings=settings)])
