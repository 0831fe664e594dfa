"""``train.optimiser: lomo`` has the bits of SGD, and never holds two gradients."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedtune import techniques
from fedtune.errors import MemoryBudgetError, RecipeError
from fedtune.recipe.schema import Unit
from fedtune.training import ClientRound, LocalTrainingResult, get_model_state, train_local_model
from tests.families import FAMILIES
from tests.federations import trivial, words
from tests.technique_steps import chosen
from tests.tiny import a_training_recipe, few_texts


def a_round(
    family: str, joined: str, optimiser: str, dtype: torch.dtype | None = None, **own: Any
) -> LocalTrainingResult:
    model: nn.Module = FAMILIES[family].model()
    model = model if dtype is None else model.to(dtype)
    units = chosen(joined)
    names = techniques.apply_techniques(units, model, FAMILIES[family].task, 0)
    settings: dict[str, Any] = {"local_steps": 3, "batch_size": 4, "optimiser": optimiser, "lr": 0.05, **own}
    recipe = a_training_recipe(**settings)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_grad_norm": None})})
    data = few_texts(language=not FAMILIES[family].task.has_classes)
    state = get_model_state(model, names)
    return train_local_model(ClientRound(model, units, recipe, data, np.arange(8), 1, 1), state)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("joined", ["full", "gradient-checkpointing+full", "lora", "meft", "badam"])
@pytest.mark.parametrize("family", ["bert", "qwen2", "opt"])
def test_a_round_has_the_bits_of_sgd(family: str, joined: str, dtype: torch.dtype | None) -> None:
    """With dropout, a tied head (qwen2, opt) and weights of lower precision, which have master copies."""
    own = {"weight_decay": 0.1}
    wanted, found = (a_round(family, joined, optimiser, dtype, **own) for optimiser in ("sgd", "lomo"))
    assert found.train_loss == wanted.train_loss
    assert found.delta.keys() == wanted.delta.keys()
    assert all(torch.equal(found.delta[name], wanted.delta[name]) for name in wanted.delta)
    assert any(delta.any() for delta in wanted.delta.values())


def test_each_gradient_is_freed_before_the_next_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtune.training import backward_updates

    held: dict[str, list[int]] = {"sgd": [], "lomo": []}
    real = backward_updates.update_in_backward
    for optimiser, counts in held.items():

        def counting(stepper: Any, parameters: Any, lr: float, *, active: bool, counts: list[int] = counts) -> Any:
            manager = real(stepper, parameters, lr, active=active)
            for one in parameters if not counts else ():
                one.register_post_accumulate_grad_hook(
                    lambda _: counts.append(sum(other.grad is not None for other in parameters))
                )
            return manager

        monkeypatch.setattr("fedtune.training.local_training.update_in_backward", counting)
        a_round("bert", "full", optimiser, local_steps=1)
    assert max(held["sgd"]) > 20
    assert max(held["lomo"]) == 1  # that of the parameter at hand
    assert len(held["lomo"]) == len(held["sgd"])


def test_what_needs_all_gradients_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="updates weights before all gradients are known, so drop max_grad_norm"):
        trivial("train.optimiser=lomo")
    assert trivial("train.optimiser=lomo", "train.max_grad_norm=null").train.optimiser == "lomo"
    with pytest.raises(RecipeError, match="and dynamic-pruning may change gradients after it; take sgd"):
        trivial("train.optimiser=lomo", "train.max_grad_norm=null", "train.techniques=[dynamic-pruning]")
    with pytest.raises(RecipeError, match="settings of sgd, but optimiser is lomo"):
        words(tmp_path, "train.optimiser=lomo", "train.momentum=0.9")


def test_a_batch_in_parts_is_refused_before_any_weight_moves() -> None:
    model = FAMILIES["bert"].model()
    units = techniques.build_techniques([Unit(name="full")])
    names = techniques.apply_techniques(units, model, FAMILIES["bert"].task, 0)
    recipe = a_training_recipe(local_steps=1, batch_size=4, optimiser="sgd")
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"optimiser": "lomo"})})
    client = ClientRound(model, units, recipe, few_texts(), np.arange(8), 1, 1, micro_batch_size=2)
    state = get_model_state(model, names)
    with pytest.raises(MemoryBudgetError, match=r"a batch must pass at once; lower train.batch_size to 2, or take sgd"):
        train_local_model(client, state)
    assert all(torch.equal(one, state[name]) for name, one in get_model_state(model, names).items())


def test_when_memory_ends_a_step_is_not_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("fedtune.training.training_step._add_gradients", fail)
    with pytest.raises(MemoryBudgetError, match="batch_size to 2"):
        a_round("bert", "full", "lomo")


@pytest.mark.parametrize("joined", ["int8-activations+full", "offload+full", "compact", "division+full"])
def test_tensors_kept_in_another_form_do_not_mind_moving_weights(joined: str) -> None:
    wanted, found = (a_round("bert", joined, optimiser) for optimiser in ("sgd", "lomo"))
    assert all(torch.equal(found.delta[name], wanted.delta[name]) for name in wanted.delta)
    assert any(delta.any() for delta in wanted.delta.values())
