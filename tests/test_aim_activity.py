"""Activation statistics of models: which weights, over which tokens, in whatever batches."""

from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from fedtune import techniques
from fedtune.data.sampling import sample_rows
from fedtune.data.token_blocks import iter_token_blocks
from fedtune.errors import DataError, RecipeError
from fedtune.merging import (
    ActivationSums,
    average_activations,
    build_pipeline,
    check_merge_has_targets,
    find_input_channels,
    measure_activation_statistics,
    sum_activations,
)
from fedtune.models import load_model
from fedtune.recipe.schema import ModelSettings, Unit
from fedtune.tasks import get_task
from fedtune.training.calibration_inputs import load_calibration_inputs
from tests.tiny import FewTexts, bert, few_texts, llama

Batch = Mapping[str, Tensor]


def in_batches(data: FewTexts, size: int) -> Iterator[Batch]:
    for start in range(0, len(data), size):
        yield data.make_batch(range(start, min(start + size, len(data))))


def close(one: Mapping[str, object], other: Mapping[str, object]) -> None:
    assert one.keys() == other.keys()
    torch.testing.assert_close(dict(one), dict(other), rtol=1e-6, atol=1e-9)


def test_a_linear_layer_counts_mean_absolute_inputs() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 2)})
    model.forward = lambda x: model["a"](x)
    x = torch.tensor([[1.0, -2.0, 0.0], [3.0, 2.0, 0.0]])
    found = measure_activation_statistics(model, [{"x": x}])
    assert found.keys() == {"a.weight"}
    assert found["a.weight"].mean_abs.tolist() == [2.0, 2.0, 0.0]
    assert (found["a.weight"].axis, found["a.weight"].mean_abs.dtype) == (1, torch.float64)


def test_a_decoder_has_statistics_of_the_published_weights_and_no_others() -> None:
    model = llama(tie_word_embeddings=False)
    found = set(find_input_channels(model))
    layer = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj"]
    layer += ["mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"]
    wanted = {f"model.layers.{index}.{name}.weight" for index in (0, 1) for name in layer}
    assert found == wanted | {"model.norm.weight", "lm_head.weight"}


def test_an_output_layer_tied_to_the_embeddings_counts_as_one() -> None:
    model = llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not [name for name in find_input_channels(model) if "head" in name or "embed" in name]


def test_statistics_are_what_a_plain_loop_over_single_texts_gives() -> None:
    model, data = llama().eval(), few_texts(language=True)
    layer, seen = model.model.layers[1].mlp.down_proj, []
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()[0]))
    with torch.no_grad():
        for row in data.rows:
            model(input_ids=torch.tensor([row]))
    handle.remove()
    wanted = torch.cat(seen).double().abs().mean(0)
    found = measure_activation_statistics(model, in_batches(data, 5))["model.layers.1.mlp.down_proj.weight"]
    torch.testing.assert_close(found.mean_abs, wanted, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("size", [1, 3, 12])
def test_statistics_do_not_depend_on_the_batches_nor_on_padding(size: int) -> None:
    model, data = bert(), few_texts()
    one, other = (measure_activation_statistics(model, in_batches(data, count)) for count in (4, size))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name].mean_abs, other[name].mean_abs, rtol=1e-5, atol=1e-8)


def test_padding_would_have_counted() -> None:
    model, data = bert(), few_texts()
    batch = dict(data.make_batch(range(12)))
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    real = measure_activation_statistics(model, [batch])[name].mean_abs
    mask = batch.pop("attention_mask")
    all_tokens = measure_activation_statistics(model, [{**batch, "attention_mask": torch.ones_like(mask)}])[
        name
    ].mean_abs
    assert float((real - all_tokens).norm() / real.norm()) > 1e-3


def test_the_pooled_input_counts_once_per_text_and_inner_ones_per_token() -> None:
    model, data = bert(), few_texts()
    found = sum_activations(model, find_input_channels(model), in_batches(data, 4))
    assert found["classifier.weight"].count == 12
    assert found["bert.encoder.layer.0.output.dense.weight"].count == sum(map(len, data.rows))


def test_dropout_labels_and_gradients_play_no_part() -> None:
    model, data = bert().train(), few_texts()
    random = torch.random.get_rng_state()
    batch = data.make_batch(range(4))
    one = measure_activation_statistics(model, [{**batch, "labels": torch.full((4,), 99)}])
    assert torch.equal(torch.random.get_rng_state(), random)
    other = measure_activation_statistics(model, [batch])
    assert all(torch.equal(one[name].mean_abs, other[name].mean_abs) for name in one)
    assert not any(found.mean_abs.requires_grad for found in one.values())


def test_hooks_are_gone_afterwards_even_when_a_batch_fails() -> None:
    model = bert()
    with pytest.raises(ValueError, match="input_ids"):
        measure_activation_statistics(model, [{"nonsense": torch.ones(1)}])
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=1, n_head=2, pad_token_id=0))


def test_gpt2_keeps_its_input_channels_on_the_first_axis() -> None:
    found = measure_activation_statistics(gpt2(), in_batches(few_texts(language=True), 4))
    fused = found["transformer.h.0.attn.c_attn.weight"]
    assert (fused.axis, fused.mean_abs.shape) == (0, (16,))
    assert found["transformer.h.0.mlp.c_proj.weight"].mean_abs.shape == (64,)
    assert "transformer.wte.weight" not in found


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plain = nn.Conv2d(3, 4, 3)
        self.grouped = nn.Conv2d(4, 6, 1, groups=2)
        self.depthwise = nn.Conv2d(6, 12, 1, groups=6)
        self.norm = nn.BatchNorm2d(12)
        self.back = nn.ConvTranspose2d(12, 2, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.back(self.norm(self.depthwise(self.grouped(self.plain(pixel_values)))))  # type: ignore[no-any-return]


def test_convolutions_have_one_figure_per_channel_of_their_group() -> None:
    model, pictures = Convolutions(), torch.randn(2, 3, 6, 6)
    found = measure_activation_statistics(model, [{"pixel_values": pictures}])
    torch.testing.assert_close(found["plain.weight"].mean_abs, pictures.double().abs().mean((0, 2, 3)))
    with torch.no_grad():
        inner = model.plain(pictures).double().abs().mean((0, 2, 3))
    grouped = found["grouped.weight"].mean_abs
    assert grouped.shape == model.grouped.weight.shape[:2]
    torch.testing.assert_close(grouped, torch.stack([*[inner[:2]] * 3, *[inner[2:]] * 3]))
    assert found["depthwise.weight"].mean_abs.shape == (12, 1)
    assert (found["norm.weight"].axis, found["norm.weight"].mean_abs.shape) == (0, (12,))
    assert (found["back.weight"].axis, found["back.weight"].mean_abs.shape) == (0, (12,))


class Routed(nn.Module):
    """Two experts; positive tokens go to the first, and nobody asks the third."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))

    def forward(self, x: Tensor) -> None:
        self.experts[0](x[x > 0].unsqueeze(-1))
        self.experts[1](x[x <= 0].unsqueeze(-1))


def test_experts_count_their_own_tokens_and_an_idle_one_has_no_statistic() -> None:
    found = measure_activation_statistics(Routed(), [{"x": torch.tensor([1.0, 3.0, -5.0])}])
    assert {name: float(one.mean_abs) for name, one in found.items()} == {
        "experts.0.weight": 2.0,
        "experts.1.weight": 5.0,
    }


def with_techniques(model: nn.Module, *units: Unit) -> tuple[tuple[techniques.Technique, ...], list[str]]:
    chosen = techniques.build_techniques(units)
    return chosen, techniques.apply_techniques(chosen, model, get_task("text-generation"), 0)


def test_an_adapters_a_reads_what_its_layer_reads_and_b_has_no_channels() -> None:
    model, data = llama(), few_texts(language=True)
    plain = measure_activation_statistics(model, in_batches(data, 4))
    chosen, _ = with_techniques(model, Unit(name="lora"))
    found = measure_activation_statistics(model, in_batches(data, 4), chosen)
    for target in ("self_attn.q_proj", "mlp.down_proj"):
        wanted = plain[f"model.layers.0.{target}.weight"].mean_abs
        for part in ("base_layer", "lora_A.default"):
            torch.testing.assert_close(found[f"model.layers.0.{target}.{part}.weight"].mean_abs, wanted)
    assert not [name for name in found if "lora_B" in name]


def test_totals_of_several_places_add_up_to_the_total_of_all() -> None:
    model, data = bert(), few_texts()
    places = find_input_channels(model)
    first, second = (sum_activations(model, places, [data.make_batch(part)]) for part in (range(5), range(5, 12)))
    both = {n: ActivationSums(first[n].sums + second[n].sums, first[n].count + second[n].count) for n in places}
    whole = average_activations(places, sum_activations(model, places, [data.make_batch(range(12))]))
    for name, found in average_activations(places, both).items():
        torch.testing.assert_close(found.mean_abs, whole[name].mean_abs, rtol=1e-5, atol=1e-8)


AIM = build_pipeline([Unit(name="mean"), Unit(name="aim")]).steps


@pytest.mark.parametrize("unit", [Unit(name="lora", settings={"trained_factors": "b-only"}), Unit(name="bias")])
def test_a_merge_that_would_scale_nothing_is_refused(unit: Unit) -> None:
    model = gpt2()
    _, shared = with_techniques(model, unit)
    with pytest.raises(
        RecipeError, match=r"^merge: aim scales weights by .* trains no such weight; drop aim, or train"
    ):
        check_merge_has_targets(AIM, model, shared)


@pytest.mark.parametrize("unit", [Unit(name="full"), Unit(name="lora")])
def test_a_merge_that_scales_something_is_not_refused(unit: Unit) -> None:
    model = gpt2()
    _, shared = with_techniques(model, unit)
    check_merge_has_targets(AIM, model, shared)


def test_norms_alone_are_something_to_scale_only_where_norms_are_scaled() -> None:
    model = gpt2()
    norms = [name for name, _ in model.named_parameters() if "ln_" in name]
    check_merge_has_targets(AIM, model, norms)
    without = build_pipeline([Unit(name="mean"), Unit(name="aim", settings={"norms": False})]).steps
    with pytest.raises(RecipeError, match="trains no such weight"):
        check_merge_has_targets(without, model, norms)


def test_masked_weights_are_refused() -> None:
    model = load_model(ModelSettings(source="sample:logistic"), get_task("image-classification"), ["a", "b"], seed=0)
    _, shared = with_techniques(model, Unit(name="dynamic-pruning"))
    with pytest.raises(RecipeError, match=r"^merge: aim scales whole columns, but masked weights .*; drop one$"):
        check_merge_has_targets(AIM, model, shared)


def test_blocks_are_short_texts_end_to_end_without_the_rest() -> None:
    rows = [[1, 2], [], [3] * 5, [4], [5, 6, 7], [8]]
    found = list(iter_token_blocks(rows, block_size=3, num_documents=4, batch=1))
    assert [one["input_ids"].tolist() for one in found] == [[[1, 2, 4]], [[5, 6, 7]]]
    assert all(bool(one["attention_mask"].all()) for one in found)


def test_too_little_calibration_text_is_one_sentence() -> None:
    with pytest.raises(DataError, match=r"^the calibration text gives 2 tokens, less than a block of 3; bring more$"):
        list(iter_token_blocks([[1, 2]], block_size=3))


def test_a_few_examples_are_drawn_by_the_seed_and_null_takes_all() -> None:
    indices = np.arange(100, 110)
    assert sample_rows(indices, None, 0) == sample_rows(indices, 10, 0) == list(range(100, 110))
    assert sample_rows(indices, 4, 1) == sample_rows(indices, 4, 1) == sorted(sample_rows(indices, 4, 1))
    assert sample_rows(indices, 4, 1) != sample_rows(indices, 4, 2)


def test_calibration_reads_text_blocks_texts_and_pictures_of_any_source() -> None:
    minilm, smollm2 = ModelSettings(source="sample:minilm"), ModelSettings(source="sample:smollm2")
    blocks = load_calibration_inputs("sample:films", smollm2, get_task("text-generation"), block=64)
    assert {one["input_ids"].shape[1] for one in blocks} == {64}
    texts = load_calibration_inputs("sample:films", minilm, get_task("text-classification"), block=32)
    assert sum(len(one["input_ids"]) for one in texts) == 256
    assert "labels" not in texts[0]
    pictures = load_calibration_inputs(
        "sample:digits", ModelSettings(source="sample:logistic"), get_task("image-classification")
    )
    assert sum(len(one["pixel_values"]) for one in pictures) == 256
