import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from fedtune import models, techniques
from fedtune.cli import main
from fedtune.errors import FedtuneWarning
from fedtune.recipe.schema import ModelSettings
from fedtune.recipe.unit_registry import describe_unit_settings, read_unit_card
from fedtune.tasks import Task
from fedtune.techniques import begin_round, list_trainable_tensors
from tests.technique_steps import IMAGES, LANGUAGE, TEXT, chosen, gradients, layers, logits, shake, shared
from tests.tiny import bert, llama, texts

ROOT = Path(__file__).parents[1]


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
    names = techniques.apply_techniques(picked, model, TEXT, 0)
    for number, factor in enumerate(factors, 1):
        begin_round(picked, model, number)
        now = list_trainable_tensors(model)
        assert {name.split(".lora_")[1][0] for name in now if ".lora_" in name} == {factor}
        assert len([name for name in now if ".lora_" in name]) == 13
        assert "classifier.weight" in now
    assert any(".lora_A." in name for name in names) == (exact == "alternate")


@pytest.mark.parametrize(("build", "task"), [(bert, TEXT), (llama, LANGUAGE)])
def test_a_folded_lora_gives_the_same_logits_without_lora(build: Callable[[], PreTrainedModel], task: Task) -> None:
    model, plain = build(), build()
    [lora] = chosen("lora", dropout=0.1)
    names = techniques.apply_techniques([lora], model, task, 0)
    shake(model, names)
    batch = texts(model)
    wanted, start = logits(model, batch), logits(plain, batch)
    lora.merge_into_weights(model)
    torch.testing.assert_close(logits(model, batch), wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(wanted, start, atol=1e-2)
    assert list(layers(model, LoraLayer)) == []
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_pairs_at_the_transposed_layers_of_gpt2_fold_too() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    )
    [lora] = chosen("lora")
    names = techniques.apply_techniques([lora], model, LANGUAGE, 0)
    assert len(names) == 2 * 4
    shake(model, names)
    batch = texts(llama())
    wanted = logits(model, batch)
    lora.merge_into_weights(model)
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
    with pytest.warns(
        UserWarning, match=r"lora puts no pair beside 60% of the weights of Pointwise.* convolutions, such"
    ):
        names = techniques.apply_techniques([lora], model, IMAGES, 0)
    assert names == ["head.bias", "head.weight", "point.lora_A.default.weight", "point.lora_B.default.weight"]
    shake(model, names)
    pixels = torch.randn(3, 4, 5, 5)
    wanted = model(pixels)
    lora.merge_into_weights(model)
    torch.testing.assert_close(model(pixels), wanted, rtol=0, atol=1e-5)
    assert type(model.point) is nn.Conv2d


def test_peft_is_told_of_the_pair_and_the_head() -> None:
    model = bert()
    [lora] = chosen("lora", rank=3, alpha=6)
    techniques.apply_techniques([lora], model, TEXT, 0)
    config = lora.make_peft_config(model, TEXT)
    assert config is not None
    told = config.to_dict()
    assert (told["r"], told["lora_alpha"], told["modules_to_save"]) == (3, 6, ["classifier"])
    assert told["task_type"] == "SEQ_CLS"
    assert [chosen(name)[0].make_peft_config(bert(), TEXT) for name in ("full", "bias", "head-only")] == [None] * 3


@pytest.fixture
def four_bit(tmp_path: Path) -> nn.Module:
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    [qlora] = chosen("qlora")
    return models.load_model(
        ModelSettings(source=f"path:{tmp_path}"), LANGUAGE, (), seed=0, quantisation=qlora.make_quantisation_config()
    )


def test_a_classifiers_new_head_stays_out_of_the_four_bits(tmp_path: Path) -> None:
    bert(hidden_size=64, intermediate_size=128).bert.save_pretrained(tmp_path)
    [qlora] = chosen("qlora")
    base = ModelSettings(source=f"path:{tmp_path}")
    model = models.load_model(base, TEXT, ("a", "b", "c"), seed=0, quantisation=qlora.make_quantisation_config())
    assert type(model.get_submodule("classifier")) is nn.Linear
    assert type(model.get_submodule("bert.encoder.layer.0.intermediate.dense")) is Linear4bit
    qlora.rewrite_model(model, TEXT, seed=0)
    assert model(**texts(bert())).loss.isfinite()


def test_qlora_trains_pairs_beside_four_bit_layers(four_bit: PreTrainedModel) -> None:
    assert len(list(layers(four_bit, Linear4bit))) == 2 * 7
    names = shared("qlora", four_bit, LANGUAGE)
    assert len(names) == 2 * 2 * 7
    begin_round(chosen("qlora"), four_bit, 1)
    four_bit.train()
    four_bit(**texts(four_bit)).loss.backward()
    parameters = dict(four_bit.named_parameters())
    for name in list_trainable_tensors(four_bit):
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
    shake(four_bit, techniques.apply_techniques([qlora], four_bit, LANGUAGE, 0))
    batch = texts(four_bit)
    wanted = logits(four_bit, batch)
    qlora.merge_into_weights(four_bit)
    torch.testing.assert_close(logits(four_bit, batch), wanted, rtol=0, atol=1e-4)
    assert [*layers(four_bit, Linear4bit), *layers(four_bit, LoraLayer)] == []
    assert {parameter.dtype for parameter in four_bit.parameters()} == {torch.float32}


def test_qlora_stores_weights_in_a_seventh_of_the_bytes(four_bit: PreTrainedModel) -> None:
    layer = four_bit.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, Linear4bit)
    assert layer.weight.nbytes == 64 * 128 // 2
    assert chosen("lora")[0].make_quantisation_config() is None


def test_a_warning_is_one_line_on_the_command_line() -> None:
    assert main.format_warning(FedtuneWarning("lora puts no pair"), FedtuneWarning, "file.py", 3, None) == (
        "fedtune: lora puts no pair\n"
    )
    assert "file.py:3: UserWarning: other" in main.format_warning(UserWarning("other"), UserWarning, "file.py", 3, "")


def test_the_cards_tell_the_rates_that_were_measured_for_one_factor_a_round() -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "low_rank_default.json").read_text())["claims"]
    assert [round(measured[part]["alternate"]["rate_over_usual"]) for part in ("minilm", "smollm2")] == [3, 1]
    card = " ".join(read_unit_card("fedtune.techniques", "lora").split())
    assert "three times that of LoRA with both factors on MiniLM, and the same on SmolLM2" in card
    assert "Search the learning rate as for LoRA" in read_unit_card("fedtune.techniques", "qlora")
    for name in ("lora", "qlora"):
        assert "at one to three times the usual rate" in " ".join(describe_unit_settings("fedtune.techniques", name))
