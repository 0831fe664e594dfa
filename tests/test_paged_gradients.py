"""A step on a model whose matrices are in a store: same bits as in memory, nothing kept, every byte accounted for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification, PreTrainedModel

from fedtune import models, techniques
from fedtune.errors import FedtuneWarning, ModelError
from fedtune.memory import StorageMeter
from fedtune.models.paging import paged_layers, paged_matrix
from fedtune.models.paging.paged_layers import (
    PagedEmbedding,
    PagedLinear,
    list_paged_layers,
    replace_paged_layers,
)
from fedtune.models.paging.paged_matrix import PagedMatrix
from fedtune.recipe.schema import ModelSettings
from tests.families import FAMILIES
from tests.paged_models import count_reads, load_family, read_from_memory, take_step
from tests.technique_steps import shared

LLAMA = FAMILIES["llama"]
pytestmark = pytest.mark.filterwarnings("ignore:.*model.paged leaves:fedtune.errors.FedtuneWarning")  # tiny models


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))


def prepare(name: str, folder: Path, techniques: str, paged: bool | str, **settings: Any) -> nn.Module:
    model = load_family(name, folder, paged, **settings)
    shared(techniques, model, FAMILIES[name].task)
    return model


def step(name: str, folder: Path, techniques: str, paged: bool | str, **settings: Any) -> dict[str, Tensor]:
    return take_step(FAMILIES[name], prepare(name, folder, techniques, paged, **settings))


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("techniques", ["lora", "lora+gradient-checkpointing", "meft"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "opt", "bert", "roberta", "vit"])
def test_gradients_have_the_bits_of_the_model_in_memory(name: str, techniques: str, tmp_path: Path) -> None:
    """With biases (qwen2, opt, bert), a tied head (qwen2, opt), dropout and a drawn pooler (roberta)."""
    wanted = step(name, tmp_path / "base", techniques, False)
    assert len(wanted) > 8
    assert same(step(name, tmp_path / "base", techniques, True), wanted)


def test_activations_in_a_file_have_them_too(tmp_path: Path) -> None:
    wanted = step("llama", tmp_path / "base", "lora", True)
    model = load_family("llama", tmp_path / "base", True)
    shared("offload+lora", model, LLAMA.task, min_bytes=1)
    assert same(take_step(LLAMA, model), wanted)
    assert vars(model)["offload"].file.written_bytes > 10000


@pytest.mark.parametrize("techniques", ["lora+fused-cross-entropy", "lora+gradient-checkpointing", "meft"])
@pytest.mark.parametrize("form", ["bf16", "int8", "nf4"])
def test_gradients_have_the_bits_of_the_same_store_in_memory(
    form: str, techniques: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = step("llama", tmp_path / "base", techniques, form)
    with read_from_memory(monkeypatch):
        assert same(step("llama", tmp_path / "base", techniques, form), found)
    rounded = prepare("llama", tmp_path / "base", techniques.replace("+fused-cross-entropy", ""), form)
    exact = step("llama", tmp_path / "base", techniques, False)
    assert not torch.equal(found["loss"], exact["loss"]), "the format rounds"
    assert torch.allclose(take_step(LLAMA, rounded)["loss"], exact["loss"], rtol=0.02)


def test_a_bf16_source_with_a_norm_in_fp32_in_shards_has_the_bits_of_the_model_in_memory(tmp_path: Path) -> None:
    model = LLAMA.model()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.bfloat16() if "norm" not in name else parameter.data * 1.001
    assert isinstance(model, PreTrainedModel)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    for dtype in ("float32", "bfloat16"):
        found = step("llama", tmp_path / "base", "lora", True, dtype=dtype)
        assert same(found, step("llama", tmp_path / "base", "lora", False, dtype=dtype))
    matrices = {layer.matrix.form for _, layer in list_paged_layers(load_family("llama", tmp_path / "base", True))}
    assert matrices == {"bf16"}


def test_matrices_that_are_read_in_pieces_differ_by_rounding_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = step("opt", tmp_path / "base", "lora", False)
    monkeypatch.setattr(paged_matrix, "LARGEST_PIECE", 1000)
    found = step("opt", tmp_path / "base", "lora", True)
    assert torch.equal(found["loss"], wanted["loss"])
    assert not same(found, wanted)
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-6) for name in wanted)


def test_the_streamed_head_has_the_loss_and_the_gradients_of_the_fused_one(tmp_path: Path) -> None:
    for name in ("llama", "opt"):
        wanted = step(name, tmp_path / name, "lora+fused-cross-entropy", False)
        found = step(name, tmp_path / name, "lora+fused-cross-entropy", True)
        assert all(torch.allclose(found[one], wanted[one], rtol=1e-4, atol=1e-7) for one in wanted)


@torch.no_grad()
@pytest.mark.parametrize("techniques", ["lora+fused-cross-entropy", "lora+error-norm-truncation", "lora+chunked-mlp"])
def test_scores_are_those_of_the_model_in_memory(techniques: str, tmp_path: Path) -> None:
    out = [prepare("llama", tmp_path / "base", techniques, paged) for paged in (True, False)]
    batch = LLAMA.make_batch()
    assert torch.equal(*(model.eval()(**batch).logits for model in out))


def linear_sizes(model: nn.Module, part: str) -> int:
    return sum(
        layer.matrix.nbytes
        for name, layer in list_paged_layers(model)
        if part in name and isinstance(layer, PagedLinear)
    )


def test_the_bytes_read_in_a_step_are_those_of_the_formula(tmp_path: Path) -> None:
    """LoRA: blocks forward and backward, but nothing leads back from the first queries, keys and values.

    Checkpointing reads each block once more, up to the last tensor that is kept; the streamed head is read once.
    """
    batch = LLAMA.make_batch()
    embedded = len(batch["input_ids"].unique()) * 32 * 4
    plain = prepare("llama", tmp_path / "base", "lora+fused-cross-entropy", "fp32")
    blocks, head = linear_sizes(plain, "layers."), 50 * 32 * 4
    first = sum(linear_sizes(plain, f"layers.0.self_attn.{one}_proj") for one in "qkv")
    before = count_reads(plain)
    take_step(LLAMA, plain)
    assert count_reads(plain) - before == embedded + 2 * blocks - first + head
    redone = prepare("llama", tmp_path / "base", "lora+fused-cross-entropy+gradient-checkpointing", "fp32")
    before = count_reads(redone)
    take_step(LLAMA, redone)
    assert count_reads(redone) - before == embedded + 3 * blocks - first + head


def kept(techniques: str, folder: Path, **settings: Any) -> tuple[int, int]:
    """The bytes kept for the backward pass, and those of the largest matrix."""
    model = prepare("llama", folder, techniques, True, **settings)
    take_step(LLAMA, model)  # the buffers of the store are made
    model.zero_grad()
    with StorageMeter(excluded=[*model.parameters(), *model.buffers()]) as meter:
        loss = model.train()(**LLAMA.make_batch()).loss
        found = meter.current_bytes
    del loss
    return found, max(layer.matrix.nbytes for _, layer in list_paged_layers(model))


def test_no_matrix_is_kept_for_the_backward_pass_and_one_that_is_would_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, matrix = kept("lora", tmp_path / "base")

    class Saves(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, matrix: PagedMatrix, bias: Tensor | None) -> Tensor:
            weight = matrix.copy_whole()
            ctx.save_for_backward(weight)
            return F.linear(x, weight, bias)

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
            [weight] = ctx.saved_tensors
            return upstream[0] @ weight, None, None

    monkeypatch.setattr(paged_layers, "_Multiply", Saves)
    spoilt, _ = kept("lora", tmp_path / "base")
    assert spoilt > found + matrix, "the negative control keeps every matrix"


def test_plain_layers_take_the_place_of_paged_ones_and_a_tied_head_stays_tied(tmp_path: Path) -> None:
    model: Any = load_family("qwen2", tmp_path / "base", True)
    names = set(dict(model.named_parameters(remove_duplicate=False)))
    replace_paged_layers(model)
    plain: Any = load_family("qwen2", tmp_path / "base", False)
    assert set(dict(model.named_parameters(remove_duplicate=False))) == names
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), plain.parameters(), strict=True))


def test_saving_placeholders_is_refused_until_plain_layers_are_back(tmp_path: Path) -> None:
    model: Any = load_family("llama", tmp_path / "base", True)
    with pytest.raises(ModelError, match="the weights of this model are in a file; put them into plain layers before"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    techniques.merge_into_weights((), model)
    model.save_pretrained(tmp_path / "out")
    assert same(load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "base" / "model.safetensors"))


def test_weights_that_a_model_reads_without_calling_their_layer_are_in_memory(tmp_path: Path) -> None:
    size: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    shape = DebertaV2Config(**size, num_hidden_layers=1, relative_attention=True, pos_att_type=["p2c", "c2p"])
    torch.manual_seed(0)
    DebertaV2ForSequenceClassification(shape).save_pretrained(tmp_path / "base")
    out = []
    for paged in (True, False):
        settings = ModelSettings(source=f"path:{tmp_path / 'base'}", paged=paged)
        model = models.load_model(settings, FAMILIES["bert"].task, ("a", "b"), seed=0).eval()
        out.append(model(**{**FAMILIES["bert"].make_batch(), "labels": None}).logits)
    assert torch.equal(*out)


def test_an_index_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    layer = next(
        one
        for _, one in list_paged_layers(load_family("llama", tmp_path / "base", True))
        if isinstance(one, PagedEmbedding)
    )
    for number in (-1, 50):
        with pytest.raises(IndexError, match=r"index out of range: the embedding \S+ has 50 rows"):
            layer(torch.tensor([3, number]))
    assert layer(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 32)


def test_a_model_without_plain_layers_says_what_is_in_memory(tmp_path: Path) -> None:
    model = FAMILIES["gpt2"].model()
    assert isinstance(model, PreTrainedModel)
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path / "base")
    with pytest.warns(FedtuneWarning, match=r"model\.paged leaves \d+% of the matrices in memory, such as transformer"):
        found = step("gpt2", tmp_path / "base", "lora", True)
    assert same(found, step("gpt2", tmp_path / "base", "lora", False))
