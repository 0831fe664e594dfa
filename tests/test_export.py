"""An export gives the same logits in plain transformers and peft; an evaluation scores all of another source."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertModel,
)

from fedtune import checkpoint
from fedtune import paths as homes
from fedtune.data import EncodedDataset
from fedtune.errors import DataError, ModelError, RecipeError, StoreError
from fedtune.export import export_model
from fedtune.recipe.schema import Recipe
from fedtune.tasks import get_task
from fedtune.training import EvaluatedModel, evaluate_model, get_run_context, set_model_state
from tests.federations import Ended, execute, trivial, words
from tests.test_bad_input import fedtune


def state(ended: Ended) -> dict[str, Tensor]:
    saved = ended.rounds[-1].checkpoint
    assert saved is not None
    return checkpoint.read_checkpoint(homes.get_runs_folder() / saved.path, saved.sha256)


@torch.no_grad()
def own_logits(recipe: Recipe, tensors: dict[str, Tensor], examples: int = 8) -> tuple[dict[str, Tensor], Tensor]:
    """Some inputs and what the model that fedtune trained says to them."""
    shop = get_run_context(recipe.model_dump_json())
    set_model_state(shop.model, tensors)
    inputs = shop.test.make_batch(range(examples))
    inputs.pop("labels")
    return inputs, shop.model.eval()(**inputs).logits


@torch.no_grad()
def assert_same_logits(model: torch.nn.Module, inputs: dict[str, Tensor], expected: Tensor) -> None:
    logits = model.eval()(**inputs).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert logits.std() > 1e-4


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft itself
def test_an_adapter_loads_in_plain_peft(home: Path, tmp_path: Path) -> None:
    recipe = words(tmp_path)
    tensors = state(execute(recipe))
    assert export_model(recipe, tensors, tmp_path / "out", None, "# a card\n") == "adapter"
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert", num_labels=2)
    inputs, expected = own_logits(recipe, tensors)
    assert_same_logits(PeftModel.from_pretrained(base, str(tmp_path / "out")), inputs, expected)
    assert (tmp_path / "out" / "README.md").read_text().startswith("# a card\n")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft itself
def test_an_adapter_carries_the_factor_that_no_round_trains(home: Path, tmp_path: Path) -> None:
    """PEFT warns of missing tensors, draws them anew, and computes something else."""
    recipe = words(tmp_path, 'train.techniques=[{"lora": {"rank": 2, "trained_factors": "b-only"}}]')
    tensors = state(execute(recipe))
    inputs, expected = own_logits(recipe, tensors)
    assert export_model(recipe, tensors, tmp_path / "out", "adapter", "") == "adapter"
    config = AutoConfig.from_pretrained(tmp_path / "out")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert", config=config)
    assert_same_logits(PeftModel.from_pretrained(base, tmp_path / "out"), inputs, expected)


@pytest.mark.parametrize("techniques", ["lora", "bias", "full", "head-only"])
def test_a_whole_model_loads_in_plain_transformers(home: Path, tmp_path: Path, techniques: str) -> None:
    recipe = words(tmp_path, f"train.techniques={techniques}")
    tensors = state(execute(recipe))
    assert export_model(recipe, tensors, tmp_path / "out", "model", "") == "model"
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    inputs, expected = own_logits(recipe, tensors)
    assert_same_logits(loaded, inputs, expected)
    assert loaded.config.id2label == {0: "bad", 1: "good"}
    text = AutoTokenizer.from_pretrained(tmp_path / "out")("the film was great")
    assert text["input_ids"] == AutoTokenizer.from_pretrained(tmp_path / "bert")("the film was great")["input_ids"]


def test_what_no_adapter_can_carry_becomes_a_whole_model_unless_an_adapter_is_asked_for(
    home: Path, tmp_path: Path
) -> None:
    recipe = words(tmp_path, "train.techniques=bias", "federation.rounds=1")
    tensors = state(execute(recipe))
    with pytest.raises(
        ModelError, match=r"^bias trains tensors that no PEFT adapter can contain; export with --format model$"
    ):
        export_model(recipe, tensors, tmp_path / "out", "adapter", "")
    assert not (tmp_path / "out").exists()
    assert export_model(recipe, tensors, tmp_path / "out", None, "") == "model"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft itself
def test_an_adapter_carries_a_pooler_that_was_drawn(home: Path, tmp_path: Path) -> None:
    """peft would draw another one."""
    recipe = words(tmp_path)
    body = BertModel.from_pretrained(tmp_path / "bert", add_pooling_layer=False)
    body.save_pretrained(tmp_path / "bert")
    tensors = state(execute(recipe))
    assert any(".pooler.dense.lora_A." in name for name in tensors)
    assert export_model(recipe, tensors, tmp_path / "out", None, "") == "adapter"
    torch.manual_seed(7)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert", num_labels=2)
    inputs, expected = own_logits(recipe, tensors)
    assert_same_logits(PeftModel.from_pretrained(base, str(tmp_path / "out")), inputs, expected)


def test_a_pooler_that_was_drawn_is_not_quantised(home: Path, tmp_path: Path) -> None:
    recipe = words(tmp_path, "train.techniques=qlora", "federation.rounds=1")
    body = BertModel.from_pretrained(tmp_path / "bert", add_pooling_layer=False)
    body.save_pretrained(tmp_path / "bert")
    tensors = state(execute(recipe))
    assert export_model(recipe, tensors, tmp_path / "out", "model", "") == "model"
    inputs, expected = own_logits(recipe, tensors)
    assert_same_logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out"), inputs, expected)
    export_model(recipe, tensors, tmp_path / "adapter", "adapter", "")
    assert "base_model.model.bert.pooler.dense.weight" in load_file(tmp_path / "adapter" / "adapter_model.safetensors")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft itself
def test_a_classifiers_adapter_carries_class_names_padding_and_tokenizer(home: Path, tmp_path: Path) -> None:
    recipe = words(tmp_path, "train.techniques=lora", "federation.rounds=1")
    tensors = state(execute(recipe))
    out = tmp_path / "out"
    assert export_model(recipe, tensors, out, "adapter", "# a card\n") == "adapter"
    config = AutoConfig.from_pretrained(out)
    assert config.id2label == {0: "bad", 1: "good"}
    assert config.pad_token_id == AutoTokenizer.from_pretrained(out).pad_token_id == 0
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert", config=config)
    inputs, expected = own_logits(recipe, tensors)
    assert_same_logits(PeftModel.from_pretrained(base, str(out)), inputs, expected)
    told = (out / "README.md").read_text()
    assert told.startswith("# a card\n")
    assert "Classes: bad, good." in told
    assert f'from_pretrained("{tmp_path / "bert"}", config=config)' in told


def test_an_existing_folder_is_left_alone(home: Path, tmp_path: Path) -> None:
    recipe = trivial("federation.rounds=1")
    tensors = state(execute(recipe))
    (tmp_path / "out").mkdir()
    with pytest.raises(StoreError, match="out exists already; choose another folder with -o"):
        export_model(recipe, tensors, tmp_path / "out", None, "")
    assert not list((tmp_path / "out").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"out", "home"}


@pytest.mark.parametrize("source", ["logistic", "efficientnet-lite0"])
def test_an_image_model_brings_its_code_along(home: Path, tmp_path: Path, source: str) -> None:
    recipe = trivial(
        f'model.source="sample:{source}"',
        "train.techniques=" + ("full" if source == "logistic" else "head-only"),
        "train.image_size=32",
        "train.lr=0.3",
        "federation={rounds: 1, clients: 1}",
        "train.local_steps=1",
        "evaluation.batch_size=256",
    )
    tensors = state(execute(recipe))
    assert export_model(recipe, tensors, tmp_path / "out", None, "") == "model"
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out", trust_remote_code=True)
    inputs, expected = own_logits(recipe, tensors)
    assert_same_logits(loaded, inputs, expected)


def verdicts(path: Path, rows: Sequence[str], heading: str = "text,label") -> str:
    path.write_text("\n".join([heading, *rows]) + "\n", encoding="utf-8")
    return f"csv:{path}"


def labels_of(found: EncodedDataset) -> list[int]:
    labels: list[int] = found.make_batch(range(len(found)))["labels"].tolist()
    return labels


def test_all_examples_of_another_source_are_numbered_by_the_names_the_model_knows(tmp_path: Path) -> None:
    shop = get_run_context(words(tmp_path).model_dump_json())
    assert shop.corpus.label_names == ("bad", "good")
    rows = [f"the film was {word},{label}" for word, label in (("great", "good"), ("weak", "bad"), ("fine", "good"))]
    assert labels_of(shop.encode_source(verdicts(tmp_path / "a.csv", rows), {})) == [1, 0, 1]
    only_good = shop.encode_source(
        verdicts(tmp_path / "b.csv", rows[:1], "review,stars"), {"text": "review", "label": "stars"}
    )
    assert labels_of(only_good) == [1]


def test_the_parts_of_another_source_are_scored_together(tmp_path: Path) -> None:
    shop = get_run_context(words(tmp_path).model_dump_json())
    (tmp_path / "parts").mkdir()
    for number, part in enumerate(("train", "test")):
        verdicts(tmp_path / "parts" / f"{part}.csv", ["the film was great,good"] * (number + 1))
    assert len(shop.encode_source(f"csv:{tmp_path / 'parts'}", {})) == 3


def test_whole_real_numbers_stand_for_class_numbers(tmp_path: Path) -> None:
    recipe = words(tmp_path)
    rows = [f"text {row} a,{row % 2}" for row in range(60)]
    verdicts(tmp_path / "words.csv", rows)
    shop = get_run_context(recipe.model_copy(update={"seed": 5}).model_dump_json())
    assert shop.corpus.label_names == ("0", "1")
    assert labels_of(shop.encode_source(verdicts(tmp_path / "real.csv", ["the film,1.0", "film was,0.0"]), {})) == [
        1,
        0,
    ]


def test_a_label_the_model_does_not_know_is_named(tmp_path: Path) -> None:
    shop = get_run_context(words(tmp_path).model_dump_json())
    source = verdicts(tmp_path / "a.csv", ["the film was fine,good", "the film was dull,so-so"])
    with pytest.raises(DataError, match=r"a.csv: the model does not know the label 'so-so'; it knows bad, good$"):
        shop.encode_source(source, {})
    with pytest.raises(RecipeError, match="--columns: unknown key 'txt'; did you mean 'text'"):
        shop.encode_source(source, {"txt": "review"})


def test_another_domain_column_gives_figures_per_domain(tmp_path: Path) -> None:
    shop = get_run_context(words(tmp_path).model_dump_json())
    rows = ["the film was fine,good,a", "the film was dull,bad,b"]
    found = shop.encode_source(verdicts(tmp_path / "a.csv", rows, "text,label,shop"), {"domain": "shop"})
    assert {
        one.domain for one in evaluate_model(EvaluatedModel(shop.model, get_task("text-classification"), 2), found)
    } == {
        "a",
        "b",
        "all",
        "mean",
    }


def test_evaluate_and_export_through_the_command_line(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = execute(words(tmp_path))
    source = verdicts(tmp_path / "a.csv", ["the film was fine,good", "the film was dull,bad"])
    assert fedtune(monkeypatch, "evaluate", "latest", "--data", source, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["run"], found["round"], found["data"]) == (ended.run.id, 2, source)
    assert {(one["domain"], one["name"]) for one in found["metrics"]} == {("all", "accuracy"), ("all", "loss")}
    assert fedtune(monkeypatch, "evaluate", "latest", "--split", "test", "--json") == 0
    scored = {one["name"]: one["value"] for one in json.loads(capsys.readouterr().out)["metrics"]}
    recorded = {m.name: m.value for m in ended.rounds[-1].metrics if (m.split, m.domain) == ("test", "all")}
    assert scored == recorded
    out = tmp_path / "out"
    assert fedtune(monkeypatch, "export", "latest", "-o", str(out), "--json") == 0
    assert json.loads(capsys.readouterr().out)["format"] == "adapter"
    assert (out / "adapter_model.safetensors").is_file()
    assert fedtune(monkeypatch, "export", "latest", "-o", str(tmp_path / "whole"), "--format", "model") == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'whole'}: model of run {ended.run.id}, round 2\n"
    assert said.err == ""


def test_a_checkpoint_file_is_the_one_that_is_scored(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = execute(trivial())
    path = homes.get_runs_folder() / ended.run.id / "round-0001.safetensors"
    assert fedtune(monkeypatch, "evaluate", str(path), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["round"] == 1
    recorded = {m.name: m.value for m in ended.rounds[1].metrics if (m.split, m.domain) == ("validation", "all")}
    assert {one["name"]: one["value"] for one in found["metrics"]} == recorded


def test_a_picture_goes_through_the_exported_preprocessor_as_through_ours(home: Path, tmp_path: Path) -> None:
    recipe = trivial("federation.rounds=1")
    tensors = state(execute(recipe))
    export_model(recipe, tensors, tmp_path / "out", None, "")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    grey = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    picture = Image.fromarray(grey).convert("RGB")
    read = processor(picture, return_tensors="pt")["pixel_values"]
    wanted = (torch.from_numpy(grey.astype(np.float32)) - 127) / 128
    torch.testing.assert_close(read, wanted.expand(1, 3, 28, 28), rtol=0, atol=1e-5)
