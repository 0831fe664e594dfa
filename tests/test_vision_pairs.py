"""Any two techniques for pictures train together on a mobile net, in either order, or are refused with the reason."""

import gc
import pickle
from collections.abc import Iterator
from copy import deepcopy
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from fedtune import techniques
from fedtune.errors import ModelError, RecipeError
from fedtune.recipe import unit_registry
from fedtune.recipe.schema import Unit
from fedtune.techniques import Technique
from fedtune.training import ClientRound, LocalTrainingResult, get_model_state, set_model_state, train_local_model
from fedtune.wire.masked_weights import find_masks
from tests.mobile_nets import SmallNet, age
from tests.technique_steps import IMAGES, logits
from tests.test_mobiletl_training import few_pictures
from tests.test_technique_pairs import CLASHES
from tests.tiny import a_training_recipe

SETTINGS: dict[str, dict[str, Any]] = {
    "activation-pruning": {"prune": 0.5},
    "dynamic-pruning": {"density": 0.7, "every": 1},
    "lora": {"rank": 2},
}
TEXTS_ONLY = {
    "chunked-mlp",
    "compact",
    "error-norm-truncation",
    "shifted-attention",
    "token-drop",
    "gradient-checkpointing",
    "deft",
    "fused-cross-entropy",
    "inf-lora",
    "meft",
    "o-lora",
    "qlora",
    "selective-checkpointing",
}
"""What a small net of plain layers refuses, or keeps as it is."""
NAMES = [name for name in unit_registry.list_unit_names("fedtune.techniques") if name not in TEXTS_ONLY]
PAIRS = [f"{one}+{other}" for one, other in combinations(NAMES, 2)]
NO_EXPORT = {"tinytl"}
pytestmark = pytest.mark.filterwarnings("ignore:lora puts no pair beside:UserWarning")


@pytest.fixture(scope="module", autouse=True)
def close_shared_memory() -> Iterator[None]:
    """Each tensor in shared memory has an open file until its model, which refers to itself, is collected."""
    yield
    gc.collect()


def chosen(joined: str) -> tuple[Technique, ...]:
    """The pair with its settings; where neither trains anything, full does."""
    units = [Unit(name=name, settings=SETTINGS.get(name, {})) for name in joined.split("+")]
    if not any(
        unit_registry.build_unit("fedtune.techniques", unit, "here").selects_trainable_tensors for unit in units
    ):
        units.append(Unit(name="full"))
    return techniques.build_techniques(units)


def prepared(joined: str) -> tuple[Any, list[str], tuple[Technique, ...]]:
    model, found = age(SmallNet()), chosen(joined)
    return model, techniques.apply_techniques(found, model, IMAGES, 0), found


def a_round(model: Any, names: list[str], found: tuple[Technique, ...]) -> LocalTrainingResult:
    recipe = a_training_recipe(local_steps=2, batch_size=8, optimiser="adamw")
    return train_local_model(
        ClientRound(model, found, recipe, few_pictures(), np.arange(12), 1, 1), get_model_state(model, names)
    )


def refused(joined: str) -> bool:
    """Both orders of a refused pair name the reason."""
    if joined not in CLASHES:
        return False
    for chain in (joined, "+".join(reversed(joined.split("+")))):
        with pytest.raises((ModelError, RecipeError), match=CLASHES[joined]):
            prepared(chain)
    return True


@pytest.mark.parametrize("joined", PAIRS)
def test_a_pair_trains_alike_in_either_order_also_as_a_pickled_copy(joined: str) -> None:
    if refused(joined):
        return
    model, names, found = prepared(joined)
    other, other_names, reverse = prepared("+".join(reversed(joined.split("+"))))
    other.share_memory()
    copied = pickle.loads(pickle.dumps(other))
    assert names == other_names
    outcome, again = a_round(model, names, found), a_round(copied, names, reverse)
    assert any(bool(delta.any()) for delta in outcome.delta.values())
    assert again.train_loss == outcome.train_loss
    assert again.delta.keys() == outcome.delta.keys()
    assert again.extra_payload.keys() == outcome.extra_payload.keys()
    assert all(torch.equal(again.delta[name], outcome.delta[name]) for name in outcome.delta)


@pytest.mark.parametrize("joined", [pair for pair in PAIRS if pair not in CLASHES])
def test_what_a_pair_learned_stays_when_all_is_folded_into_plain_layers(joined: str) -> None:
    if NO_EXPORT & set(joined.split("+")):
        return
    model, names, found = prepared(joined)
    outcome = a_round(model, names, found)
    state = get_model_state(model, names)
    set_model_state(model, {name: tensor + outcome.delta.get(name, 0 * tensor) for name, tensor in state.items()})
    for name, mask in find_masks(state).items():
        model.get_parameter(name).data.mul_(mask)
    picture = {"pixel_values": few_pictures().make_batch(range(4))["pixel_values"]}
    before = logits(deepcopy(model), picture)
    for technique in found:
        technique.merge_into_weights(model)
    assert {type(layer).__module__.split(".")[0] for layer in model.modules()} <= {"torch", "fedtune", "tests"}
    assert not any(type(layer).__module__.startswith("fedtune.techniques") for layer in model.modules())
    torch.testing.assert_close(logits(model, picture), before, rtol=1e-4, atol=1e-5)
