from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from fedtune import models
from fedtune.errors import ModelError, RecipeError
from fedtune.recipe.schema import ModelSettings
from fedtune.tasks import Task
from fedtune.techniques import begin_round, list_trainable_tensors
from fedtune.techniques._technique import list_head_parameters
from tests.technique_steps import IMAGES, LANGUAGE, TEXT, chosen, gradients, layers, shared
from tests.tiny import bert, llama, llama_classifier, texts


def test_full_trains_everything() -> None:
    model = bert()
    assert shared("full", model, TEXT) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("build", "head"), [(bert, ["classifier.bias", "classifier.weight"]), (llama_classifier, ["score.weight"])]
)
def test_classifier_trains_the_head_alone(build: Callable[[], PreTrainedModel], head: list[str]) -> None:
    assert shared("head-only", build(), TEXT) == head


def test_bias_trains_every_bias_and_the_head() -> None:
    model = bert()
    names = shared("bias", model, TEXT)
    assert set(names) == {name for name, _ in model.named_parameters() if name.endswith(".bias")} | {
        "classifier.weight"
    }
    assert "bert.encoder.layer.1.output.LayerNorm.bias" in names


def test_lora_trains_a_pair_at_every_linear_layer_and_the_head_whole() -> None:
    plain, model = bert(), bert()
    names = shared("lora", model, TEXT, rank=3)
    linear = [name for name in layers(plain, nn.Linear) if name != "classifier"]
    pairs = {f"{name}.lora_{factor}.default.weight" for name in linear for factor in "AB"}
    assert set(names) == pairs | {"classifier.bias", "classifier.weight"}
    assert model.get_parameter(f"{linear[0]}.lora_A.default.weight").shape == (3, 16)
    assert list(layers(model, LoraLayer)) == linear


def test_lora_leaves_the_output_embeddings_of_a_language_model_alone() -> None:
    model = llama()
    names = shared("lora", model, LANGUAGE)
    assert len(names) == 2 * 7 * 2
    assert not any("lm_head" in name or "embed" in name for name in names)


def test_lora_takes_endings_of_layer_names() -> None:
    model = bert()
    shared("lora", model, TEXT, targets=["query", "value"])
    found = list(layers(model, LoraLayer))
    assert len(found) == 4
    assert all(name.endswith(("query", "value")) for name in found)
    with pytest.raises(ModelError, match=r"no linear layer of BertForSeq.* ends in \['q_proj'\]; give endings such as"):
        shared("lora", bert(), TEXT, targets=["q_proj"])


@pytest.mark.parametrize("joined", ["lora+bias", "bias+lora"])
def test_the_order_of_techniques_does_not_change_what_is_trained(joined: str) -> None:
    names = shared(joined, bert(), TEXT)
    assert sum(name.endswith(".bias") for name in names) == sum(
        name.endswith(".bias") for name, _ in bert().named_parameters()
    )
    assert sum(".lora_" in name for name in names) == 2 * 13


def test_a_head_is_what_lies_behind_the_backbone_or_the_last_layer_with_weights() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2), nn.Flatten())
    assert list_head_parameters(plain) == ["2.weight", "2.bias"]
    assert list_head_parameters(bert()) == ["classifier.weight", "classifier.bias"]
    assert list_head_parameters(llama_classifier()) == ["score.weight"]


def test_frozen_parameters_get_no_gradient_and_trained_ones_do() -> None:
    for joined in ("full", "head-only", "bias", "lora", "lora+gradient-checkpointing", "bias+gradient-checkpointing"):
        model = bert()
        names = set(shared(joined, model, TEXT))
        begin_round(chosen(joined), model, 1)
        model.train()
        model(**texts(model)).loss.backward()
        with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert with_gradient == set(list_trainable_tensors(model)) <= names, joined


@pytest.mark.parametrize(
    ("joined", "sentence"),
    [
        ("full+lora", "full cannot be combined with lora: full trains the weights that lora freezes; drop one"),
        ("lora+full", "lora cannot be combined with full: full trains the weights that lora freezes; drop one"),
        ("lora+qlora", "lora cannot be combined with qlora: both add a low-rank pair to the same layers; drop one"),
        (
            "head-only+bias",
            "head-only cannot be combined with bias: the head is already trained with the biases; drop one",
        ),
        ("bias+full", "bias cannot be combined with full: full trains biases among all the rest; drop one"),
        (
            "gradient-checkpointing+qlora+head-only",
            "qlora cannot be combined with head-only: the head is already trained with the low-rank pairs; drop one",
        ),
        ("lora+lora", "lora+lora names one technique twice; drop one"),
        (
            "full+gradient-checkpointing+gradient-checkpointing",
            "full+gradient-checkpointing+gradient-checkpointing names one technique twice; drop one",
        ),
        ("gradient-checkpointing", "gradient-checkpointing trains nothing; add full, lora, bias or head-only"),
        ("lora+chekpointing", "there is no 'chekpointing'; did you mean 'gradient-checkpointing'?"),
    ],
)
def test_techniques_that_do_not_go_together_are_refused(joined: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        chosen(joined)
    assert str(caught.value) == f"train.techniques: {sentence}"


def test_a_pair_is_refused_only_where_its_settings_clash() -> None:
    assert [technique.name for technique in chosen("meft+deft", pieces=1)] == ["meft", "deft"]
    with pytest.raises(RecipeError, match="meft cannot be combined with deft: deft measures all activations"):
        chosen("meft+deft", pieces=2)


@pytest.mark.parametrize("build", [llama, llama_classifier])
def test_bias_is_refused_where_there_are_none(build: Callable[[], PreTrainedModel]) -> None:
    with pytest.raises(ModelError, match=r"^Llama\w+ has none of the parameters this technique trains; choose another"):
        shared("bias", build(), LANGUAGE if build is llama else TEXT)


def test_classifier_is_refused_for_a_language_model() -> None:
    with pytest.raises(ModelError, match="trains a new head, but text-generation has none"):
        shared("head-only", llama(), LANGUAGE)


def test_checkpointing_is_refused_for_a_model_without_blocks() -> None:
    for model in (
        models.load_model(ModelSettings(source="sample:logistic"), IMAGES, ("a", "b"), seed=0),
        nn.Linear(2, 2),
    ):
        with pytest.raises(ModelError, match="has no blocks to checkpoint; remove the technique"):
            shared("full+gradient-checkpointing", model, IMAGES)


@pytest.mark.parametrize(
    ("build", "task", "technique"),
    [(bert, TEXT, "full"), (bert, TEXT, "lora"), (llama, LANGUAGE, "full"), (llama, LANGUAGE, "lora")],
)
def test_checkpointing_keeps_the_gradients_to_the_bit_and_fewer_bytes(
    build: Callable[[], PreTrainedModel], task: Task, technique: str
) -> None:
    plain = build()
    checkpointed = deepcopy(plain)
    shared(technique, plain, task)
    shared(f"{technique}+gradient-checkpointing", checkpointed, task)
    batch = texts(plain, rows=16, length=24)
    wanted, plain_bytes = gradients(plain, batch)
    found, bytes_kept = gradients(checkpointed, batch)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert bytes_kept < plain_bytes / 2


def test_dropout_is_on_in_the_step_the_gradients_are_compared_in() -> None:
    model = bert()
    batch = texts(model)
    model.train()
    torch.manual_seed(3)
    first = model(**batch).loss
    assert not torch.equal(first, model(**batch).loss)
