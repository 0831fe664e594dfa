from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from fedtune import models, techniques
from fedtune.errors import ModelError, RecipeError
from fedtune.memory import StorageMeter
from fedtune.recipe import Model, Task, Unit
from fedtune.techniques import Technique, begin_round, trained
from fedtune.techniques._technique import head_names
from tests.tiny import bert, llama, llama_classifier, texts

TEXT: Task = "sequence-classification"
LANGUAGE: Task = "causal-language-modelling"
IMAGES: Task = "image-classification"


def chosen(joined: str, **settings: Any) -> tuple[Technique, ...]:
    """Techniques joined by ``+``; the settings are those of the first."""
    first, *others = joined.split("+")
    return techniques.choose([Unit(name=first, settings=settings), *(Unit(name=name) for name in others)])


def shared(joined: str, model: nn.Module, task: Task, seed: int = 0, **settings: Any) -> list[str]:
    return techniques.apply(chosen(joined, **settings), model, task, seed)


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    model.eval()
    with torch.no_grad():
        out: Tensor = model(**batch).logits
    return out


def shake(model: nn.Module, names: list[str], seed: int = 5) -> None:
    """Move what is trained, as a few rounds would."""
    random = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    for name in names:
        parameters[name].data += 0.1 * torch.randn(parameters[name].shape, generator=random)


def layers(model: nn.Module, kind: type[nn.Module]) -> Iterator[str]:
    return (name for name, layer in model.named_modules() if isinstance(layer, kind))


# -- what each technique trains


def test_full_trains_everything() -> None:
    model = bert()
    assert shared("full", model, TEXT) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("build", "head"), [(bert, ["classifier.bias", "classifier.weight"]), (llama_classifier, ["score.weight"])]
)
def test_classifier_trains_the_head_alone(build: Callable[[], PreTrainedModel], head: list[str]) -> None:
    assert shared("classifier", build(), TEXT) == head


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
    assert head_names(plain) == ["2.weight", "2.bias"]
    assert head_names(bert()) == ["classifier.weight", "classifier.bias"]
    assert head_names(llama_classifier()) == ["score.weight"]


def test_frozen_parameters_get_no_gradient_and_trained_ones_do() -> None:
    for joined in ("full", "classifier", "bias", "lora", "lora+checkpointing", "bias+checkpointing"):
        model = bert()
        names = set(shared(joined, model, TEXT))
        begin_round(chosen(joined), model, 1)
        model.train()
        model(**texts(model)).loss.backward()
        with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert with_gradient == set(trained(model)) <= names, joined


# -- what is refused


@pytest.mark.parametrize(
    ("joined", "sentence"),
    [
        ("full+lora", "full cannot be combined with lora; drop one"),
        ("lora+full", "lora cannot be combined with full; drop one"),
        ("lora+qlora", "lora cannot be combined with qlora; drop one"),
        ("classifier+bias", "classifier cannot be combined with bias; drop one"),
        ("bias+full", "bias cannot be combined with full; drop one"),
        ("checkpointing+qlora+classifier", "qlora cannot be combined with classifier; drop one"),
        ("lora+lora", "lora+lora names one technique twice; drop one"),
        ("full+checkpointing+checkpointing", "full+checkpointing+checkpointing names one technique twice; drop one"),
        ("checkpointing", "checkpointing trains nothing; add full, lora, bias or classifier"),
        ("lora+chekpointing", "there is no 'chekpointing'; did you mean 'checkpointing'?"),
    ],
)
def test_techniques_that_do_not_go_together_are_refused(joined: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        chosen(joined)
    assert str(caught.value) == f"train.techniques: {sentence}"


@pytest.mark.parametrize("build", [llama, llama_classifier])
def test_bias_is_refused_where_there_are_none(build: Callable[[], PreTrainedModel]) -> None:
    with pytest.raises(ModelError, match=r"^Llama\w+ has none of the parameters this technique trains; choose another"):
        shared("bias", build(), LANGUAGE if build is llama else TEXT)


def test_classifier_is_refused_for_a_language_model() -> None:
    with pytest.raises(ModelError, match="trains a new head, which causal-language-modelling has not"):
        shared("classifier", llama(), LANGUAGE)


def test_checkpointing_is_refused_for_a_model_without_blocks() -> None:
    for model in (models.load(Model(source="sample:logistic"), IMAGES, ("a", "b"), seed=0), nn.Linear(2, 2)):
        with pytest.raises(ModelError, match="has no blocks to checkpoint; leave the technique out"):
            shared("full+checkpointing", model, IMAGES)


# -- low-rank pairs


@pytest.mark.parametrize(("build", "task"), [(bert, TEXT), (llama, LANGUAGE)])
def test_lora_starts_as_the_base_to_the_bit(build: Callable[[], PreTrainedModel], task: Task) -> None:
    model = build()
    batch = texts(model)
    before = logits(model, batch)
    names = shared("lora", model, task)
    assert torch.equal(logits(model, batch), before)
    shake(model, names)
    assert not torch.allclose(logits(model, batch), before)


def test_lora_is_drawn_from_its_seed_alone() -> None:
    one, same, other = bert(), bert(), bert()
    name = shared("lora", one, TEXT, seed=7)[0]
    torch.rand(5)
    state = torch.get_rng_state()
    shared("lora", same, TEXT, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    shared("lora", other, TEXT, seed=8)
    assert torch.equal(one.get_parameter(name), same.get_parameter(name))
    assert not torch.equal(one.get_parameter(name), other.get_parameter(name))


@pytest.mark.parametrize(("exact", "factors"), [("alternate", "BABAB"), ("freeze-a", "BBBBB")])
def test_one_factor_is_trained_per_round(exact: str, factors: str) -> None:
    model, picked = bert(), chosen("lora", exact=exact)
    names = techniques.apply(picked, model, TEXT, 0)
    for number, factor in enumerate(factors, 1):
        begin_round(picked, model, number)
        now = trained(model)
        assert {name.split(".lora_")[1][0] for name in now if ".lora_" in name} == {factor}
        assert len([name for name in now if ".lora_" in name]) == 13
        assert "classifier.weight" in now
    assert any(".lora_A." in name for name in names) == (exact == "alternate")


@pytest.mark.parametrize(("build", "task"), [(bert, TEXT), (llama, LANGUAGE)])
def test_a_folded_lora_gives_the_same_logits_without_lora(build: Callable[[], PreTrainedModel], task: Task) -> None:
    model, plain = build(), build()
    [lora] = chosen("lora", dropout=0.1)
    names = techniques.apply([lora], model, task, 0)
    shake(model, names)
    batch = texts(model)
    wanted, start = logits(model, batch), logits(plain, batch)
    lora.fold(model)
    torch.testing.assert_close(logits(model, batch), wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(wanted, start, atol=1e-2)
    assert list(layers(model, LoraLayer)) == []
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_pairs_at_the_transposed_layers_of_gpt2_fold_too() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0))
    [lora] = chosen("lora")
    names = techniques.apply([lora], model, LANGUAGE, 0)
    assert len(names) == 2 * 4
    shake(model, names)
    batch = texts(llama())
    wanted = logits(model, batch)
    lora.fold(model)
    torch.testing.assert_close(logits(model, batch), wanted, rtol=0, atol=1e-5)


class Pointwise(nn.Module):
    """A depth-wise and a point-wise convolution, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = nn.Conv2d(4, 4, 3, groups=4)
        self.point = nn.Conv2d(4, 6, 1, bias=False)
        self.head = nn.Linear(6, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.head(self.point(self.depth(pixels)).mean((2, 3)))
        return out


def test_pairs_at_pointwise_convolutions_fold_too() -> None:
    torch.manual_seed(0)
    model = Pointwise()
    [lora] = chosen("lora", rank=2)
    names = techniques.apply([lora], model, IMAGES, 0)
    assert names == ["head.bias", "head.weight", "point.lora_A.default.weight", "point.lora_B.default.weight"]
    shake(model, names)
    pixels = torch.randn(3, 4, 5, 5)
    wanted = model(pixels)
    lora.fold(model)
    torch.testing.assert_close(model(pixels), wanted, rtol=0, atol=1e-5)
    assert type(model.point) is nn.Conv2d


def test_peft_is_told_of_the_pair_and_the_head() -> None:
    model = bert()
    [lora] = chosen("lora", rank=3, alpha=6)
    techniques.apply([lora], model, TEXT, 0)
    config = lora.adapter(model, TEXT)
    assert config is not None
    told = config.to_dict()
    assert (told["r"], told["lora_alpha"], told["modules_to_save"]) == (3, 6, ["classifier"])
    assert told["task_type"] == "SEQ_CLS"
    assert [chosen(name)[0].adapter(bert(), TEXT) for name in ("full", "bias", "classifier")] == [None] * 3


# -- four-bit base


@pytest.fixture
def four_bit(tmp_path: Path) -> PreTrainedModel:
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    [qlora] = chosen("qlora")
    return models.load(Model(source=f"path:{tmp_path}"), LANGUAGE, (), seed=0, quantisation=qlora.quantisation())


def test_qlora_trains_pairs_beside_four_bit_layers(four_bit: PreTrainedModel) -> None:
    assert len(list(layers(four_bit, Linear4bit))) == 2 * 7
    names = shared("qlora", four_bit, LANGUAGE)
    assert len(names) == 2 * 2 * 7
    begin_round(chosen("qlora"), four_bit, 1)
    four_bit.train()
    four_bit(**texts(four_bit)).loss.backward()
    parameters = dict(four_bit.named_parameters())
    for name in trained(four_bit):
        assert ".lora_B." in name
        gradient = parameters[name].grad
        assert gradient is not None
        assert gradient.dtype == torch.float32
        assert gradient.norm() > 0


def test_qlora_starts_as_the_quantised_base_to_the_bit(four_bit: PreTrainedModel) -> None:
    batch = texts(four_bit)
    before = four_bit.train()(**batch).logits  # a Llama has no dropout
    shared("qlora", four_bit, LANGUAGE)
    assert torch.equal(logits(four_bit, batch), before)


def test_scoring_a_four_bit_model_changes_no_bit_of_the_training_after_it(four_bit: PreTrainedModel) -> None:
    """On processors with AVX512-BF16, bitsandbytes repacks weights in a scoring pass, and gradients get lost."""
    shake(four_bit, shared("qlora", four_bit, LANGUAGE))
    batch = texts(four_bit)
    before, _ = gradients(four_bit, batch)
    four_bit.zero_grad()
    logits(four_bit, batch)
    after, _ = gradients(four_bit, batch)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_folded_qlora_gives_the_same_logits_in_plain_layers(four_bit: PreTrainedModel) -> None:
    [qlora] = chosen("qlora", targets=["q_proj", "up_proj"])
    shake(four_bit, techniques.apply([qlora], four_bit, LANGUAGE, 0))
    batch = texts(four_bit)
    wanted = logits(four_bit, batch)
    qlora.fold(four_bit)
    torch.testing.assert_close(logits(four_bit, batch), wanted, rtol=0, atol=1e-4)
    assert [*layers(four_bit, Linear4bit), *layers(four_bit, LoraLayer)] == []
    assert {parameter.dtype for parameter in four_bit.parameters()} == {torch.float32}


def test_qlora_stores_weights_in_a_seventh_of_the_bytes(four_bit: PreTrainedModel) -> None:
    layer = four_bit.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, Linear4bit)
    assert layer.weight.nbytes == 64 * 128 // 2
    assert chosen("lora")[0].quantisation() is None


# -- checkpointing


def gradients(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Gradients of a step in training mode, and the bytes kept for it."""
    model.train()
    torch.manual_seed(3)
    with StorageMeter(excluded=[*model.parameters(), *model.buffers()]) as meter:
        loss: Tensor = model(**batch).loss
        kept = meter.bytes
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, kept


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
    shared(f"{technique}+checkpointing", checkpointed, task)
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
