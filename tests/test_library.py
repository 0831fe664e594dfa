"""Techniques in somebody's own loop: what they train there, and what becomes of the model when it is saved."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedtune import techniques
from fedtune.errors import ModelError
from fedtune.recipe.schema import Unit
from fedtune.tasks import Task, get_task
from tests.tiny import bert, llama, texts

CLASSIFY = get_task("text-classification")
SPEAK = get_task("text-generation")


def applied(model: nn.Module, *units: Any, task: Task = CLASSIFY) -> tuple[techniques.Technique, ...]:
    chosen = techniques.build_techniques([Unit.model_validate(unit) for unit in units])
    techniques.apply_techniques(chosen, model, task, 1)
    return chosen


def trained(model: Any, steps: int = 3) -> set[str]:
    """The names of what a plain loop moves."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.SGD(parameters, lr=0.5)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        model(**texts(model)).loss.backward()
        optimiser.step()
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize(
    ("exact", "moved"), [("alternate", "B"), ("freeze-a", "B"), ("none", "AB"), ("remainder", "AB")]
)
def test_a_plain_loop_trains_the_factors_a_first_round_trains(exact: str, moved: str) -> None:
    model = llama()
    applied(model, {"lora": {"exact": exact}}, task=SPEAK)
    found = trained(model)
    assert {name.split(".lora_")[1][0] for name in found} == set(moved)
    factors = [name for name, _ in model.named_parameters() if ".lora_B." in name]
    assert factors
    assert set(factors) <= found


@pytest.mark.parametrize("unit", ["meft", "full", "bias", "head-only"])
def test_a_plain_loop_trains_what_other_techniques_train(unit: str) -> None:
    model = bert()
    chosen = applied(model, unit)
    assert set(techniques.list_trainable_tensors(model)) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained(model)
    assert chosen


@pytest.mark.parametrize("unit", ["meft", "lora", {"lora": {"trained_factors": "both"}}])
@pytest.mark.parametrize("task", [CLASSIFY, SPEAK])
def test_a_rewritten_model_refuses_to_be_saved_and_once_merged_loads_as_itself(
    unit: Any, task: Task, tmp_path: Path
) -> None:
    model: Any = bert() if task == CLASSIFY else llama()
    chosen = applied(model, unit, task=task)
    trained(model)
    with pytest.raises(ModelError, match=r"describe (meft|lora); .*techniques.merge_into_weights\(chosen, model\)"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    model.eval()
    expected = model(**texts(model)).logits
    techniques.merge_into_weights(chosen, model)
    model.save_pretrained(tmp_path / "saved")
    kind = AutoModelForSequenceClassification if task == CLASSIFY else AutoModelForCausalLM
    loaded = kind.from_pretrained(tmp_path / "saved", trust_remote_code=True).eval()
    torch.testing.assert_close(loaded(**texts(model)).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_model_of_several_techniques_is_saved_when_the_last_one_is_merged(tmp_path: Path) -> None:
    model = bert()
    first, second = applied(model, "lora", "deft")
    second.merge_into_weights(model)
    with pytest.raises(ModelError, match="describe lora;"):
        model.save_pretrained(tmp_path)
    first.merge_into_weights(model)
    model.save_pretrained(tmp_path)
    assert "save_pretrained" not in vars(model)
    assert "unmerged" not in vars(model)


@pytest.mark.parametrize("unit", ["full", "head-only", "bias"])
def test_a_model_whose_layers_keep_their_names_saves_itself_as_ever(unit: str, tmp_path: Path) -> None:
    model = bert()
    applied(model, unit)
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**texts(model)).logits, model(**texts(model)).logits)


def test_copies_refuse_too_and_go_to_other_processes(tmp_path: Path) -> None:
    model = bert()
    chosen = applied(model, "lora")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ModelError, match="describe lora;"):
            other.save_pretrained(tmp_path)
        techniques.merge_into_weights(chosen, other)
        other.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="describe lora;"):
        model.save_pretrained(tmp_path)
