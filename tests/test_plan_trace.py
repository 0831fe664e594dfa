"""A step on tensors without data holds the bytes of the real step, and says what it cannot answer."""

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.plan.block_lists import BlockList, find_like_blocks
from fedtune.plan.candidates import Candidate
from fedtune.plan.data_answers import DataAnswers, UnansweredError
from fedtune.plan.depth import ModelTrace, trace_model
from fedtune.plan.settings_trace import SettingsTrace
from fedtune.plan.step_trace import build_traced_model, trace_rounds, use_fake_tensors
from fedtune.plan.trace_settings import trace_candidate
from fedtune.profiling import StepProfile, make_random_batch, profile_step
from fedtune.profiling.measure_step import list_distinct_rounds, measure_step_memory
from fedtune.recipe.schema import Recipe, Unit
from fedtune.techniques.meft.meft import Meft
from fedtune.training import get_tensor_shapes, prepare_model
from tests.profile_examples import a_case, a_recipe, tiny_bert

LABELS = ("a", "b", "c")
LAYERS = 6
ENCODER = ("full", "lora", "lora+gradient-checkpointing", "lora+selective-checkpointing", "meft", "bias", "full+deft")
IN_OTHER_FORMS = (
    "full+int8-activations",
    "full+division",
    "lora+int8-activations",
    "full+offload",
    "lora+offload",
    "compact",
    "badam",
)
DECODER = (
    "lora+gradient-checkpointing+fused-cross-entropy",
    "meft+fused-cross-entropy",
    "lora+deft",
    "full+activation-pruning",
    "lora+chunked-mlp",
    "full+error-norm-truncation",
)
IMAGES = (*("full", "mobiletl", "tinytl", "bias", "full+activation-pruning", "dynamic-pruning", "last-blocks"),)


def a_decoder(folder: Path) -> Path:
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": LAYERS}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def with_techniques(recipe: Recipe, joined: str, **settings: Any) -> Recipe:
    first, *others = joined.split("+")
    units = [Unit(name=first, settings=settings), *(Unit(name=name) for name in others)]
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"techniques": units})})


def trace(recipe: Recipe, labels: tuple[str, ...]) -> ModelTrace:
    with use_fake_tensors() as answers:
        return trace_model(recipe, labels, [recipe.train.batch_size], answers)


def measure(recipe: Recipe, labels: tuple[str, ...]) -> tuple[list[tuple[int, int]], dict[str, tuple[int, ...]]]:
    """Kept and peak bytes of the real step, round by round, and the shapes of the model's tensors."""
    with torch.random.fork_rng(devices=[]):
        model, chosen, _ = prepare_model(recipe, labels)
        batch = make_random_batch(model, recipe, len(labels))
        numbers = list_distinct_rounds(model, chosen)
        rounds = [measure_step_memory(model, chosen, batch, recipe, number) for number in numbers]
        return rounds, get_tensor_shapes(model)


def compare(recipe: Recipe, labels: tuple[str, ...], *, slack: float = 0.0) -> ModelTrace:
    """The trace, once it is equal to the measurement; a peak may be ``slack`` too high, never too low."""
    found = trace(recipe, labels)
    measured, shapes = measure(recipe, labels)
    for one, (kept, peak) in zip(found.by_batch_size[0], measured, strict=True):
        assert one.kept_bytes == kept
        assert peak <= one.peak_bytes <= peak * (1 + slack)
    assert found.shapes == shapes
    return found


@pytest.mark.parametrize("joined", [*ENCODER, *IN_OTHER_FORMS])
def test_a_traced_encoder_holds_the_bytes_of_the_real_one(joined: str, tmp_path: Path) -> None:
    compare(with_techniques(a_recipe(tiny_bert(tmp_path)), joined), LABELS)


@pytest.mark.parametrize("joined", DECODER)
def test_a_decoder_traced_at_a_few_blocks_holds_the_bytes_of_the_whole(joined: str, tmp_path: Path) -> None:
    recipe = a_recipe(a_decoder(tmp_path), "task=text-generation")
    compare(with_techniques(recipe, joined), (), slack=0.03)


def test_dropped_tokens_are_planned_at_full_depth(tmp_path: Path) -> None:
    recipe = a_recipe(a_decoder(tmp_path), "task=text-generation")
    found = compare(with_techniques(recipe, "token-drop+lora", group_size=2), (), slack=0.03)
    assert found.traced_blocks in (None, LAYERS)


def test_a_deep_model_with_cuts_is_planned(tmp_path: Path) -> None:
    recipe = with_techniques(a_recipe(a_decoder(tmp_path), "task=text-generation"), "meft", value_bits=47)
    compare(recipe, ())


def test_cuts_need_a_block_on_both_sides() -> None:
    meft = Meft(value_bits=47)  # at most four blocks between two cuts
    assert meft.for_depth(4, 2) is not None
    assert meft.for_depth(6, 2) is None
    assert meft.for_depth(6, 3) is not None
    assert meft.for_depth(30, 3) is None


@pytest.mark.parametrize("joined", IMAGES)
def test_a_traced_image_model_holds_the_bytes_of_the_real_one(joined: str) -> None:
    overrides = ("task=image-classification", "model.source=sample:mobilenet-v2", "train.image_size=32")
    compare(with_techniques(a_recipe(Path("unused"), *overrides), joined), LABELS)


def test_four_bit_layers_are_planned_with_their_packed_weights(tmp_path: Path) -> None:
    recipe = a_recipe(a_decoder(tmp_path), "task=text-generation")
    found = plan_one(recipe, "qlora")
    measured = profile_step(a_case(recipe, "qlora"))
    assert (found.batches[-1].kept_bytes, found.up_bytes) == (measured.kept_bytes, measured.wire_bytes)
    model, _, _ = prepare_model(with_techniques(recipe, "qlora"), ())
    states = [one.quant_state for one in model.parameters() if hasattr(one, "quant_state")]
    scales = [part for one in states for part in (one.absmax, one.code, one.offset, one.state2.absmax)]
    tensors = [*model.parameters(), *model.buffers(), *scales]
    assert found.weight_bytes + found.mapped_bytes == sum(one.untyped_storage().nbytes() for one in tensors)


def plan_one(recipe: Recipe, joined: str) -> SettingsTrace:
    units = tuple(Unit(name=name) for name in joined.split("+"))
    found = trace_candidate(recipe, (), Candidate(units, "float32"))
    assert found.error is None
    return found


@pytest.mark.parametrize("joined", ["full", "lora"])
def test_bytes_per_round_are_those_of_the_profile(joined: str, tmp_path: Path) -> None:
    recipe = a_recipe(a_decoder(tmp_path), "task=text-generation")
    found, measured = plan_one(recipe, joined), profile_step(a_case(recipe, joined))
    assert isinstance(measured, StepProfile)
    assert (found.up_bytes, found.down_bytes) == (measured.wire_bytes, measured.down_bytes)
    assert found.trained_values == measured.trainable


def test_no_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = a_recipe(a_decoder(tmp_path), "task=text-generation")
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    real = builtins.open

    def watched(file: Any, *args: Any, **kwargs: Any) -> Any:
        assert not str(file).endswith(".safetensors")
        return real(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", watched)
    assert plan_one(recipe, "lora").batches[0].kept_bytes > 0


def test_a_tensor_hidden_from_autograd_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = with_techniques(a_recipe(tiny_bert(tmp_path)), "full")
    plain = trace(recipe, LABELS).by_batch_size[0][0].kept_bytes
    forward = nn.Linear.forward
    hidden: list[Tensor] = []

    def leak(layer: nn.Linear, x: Tensor) -> Tensor:
        hidden.append(torch.empty(1000))
        return forward(layer, x)

    monkeypatch.setattr(nn.Linear, "forward", leak)
    found = trace(recipe, LABELS).by_batch_size[0][0].kept_bytes
    assert found == plain + 4000 * len(hidden) > plain


def test_an_unknown_question_fails_with_the_name_of_its_function() -> None:
    with use_fake_tensors(), pytest.raises(UnansweredError, match=r"tests\.test_plan_trace\..* for float"):
        float(torch.ones(1).sum())


def test_blocks_that_differ_are_no_list_to_shorten() -> None:
    blocks = nn.ModuleList([nn.Linear(2, 3), *(nn.Linear(2, 2) for _ in range(5))])
    model = nn.Module()
    model.blocks = blocks
    assert find_like_blocks(model) == BlockList("blocks", 6)  # the first may differ
    blocks[3] = nn.Linear(2, 2, bias=False)
    assert find_like_blocks(model) is None


def test_names_of_removed_blocks_follow_the_inner_one() -> None:
    names = BlockList("layers", 5).expand_all(["head", "layers.0.a", "layers.1.a", "layers.1.b", "layers.2.a"])
    wanted = {"head", "layers.0.a", *(f"layers.{number}.{one}" for number in (1, 2, 3) for one in "ab"), "layers.4.a"}
    assert set(names) == wanted


def test_a_micro_batch_is_traced_with_the_model_of_the_batch(tmp_path: Path) -> None:
    recipe = with_techniques(a_recipe(tiny_bert(tmp_path)), "full")
    with use_fake_tensors() as answers:
        model = build_traced_model(recipe, LABELS, None)
        one, three = (trace_rounds(model, recipe, LABELS, size, answers)[0] for size in (1, 3))
    assert isinstance(answers, DataAnswers)
    assert one.flops * 3 == three.flops
