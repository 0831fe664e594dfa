"""What a model reads: its own padding, end tokens, class order and positions; what it cannot read is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForSequenceClassification,
)

from benchmarks.architecture_settings import WORDS
from benchmarks.architecture_zoo import LABELS, write
from fedtune import models, tasks
from fedtune.errors import DataError, ModelError
from fedtune.recipe.schema import ModelSettings, Recipe
from fedtune.recipe.yaml_file import parse_recipe
from fedtune.tasks import Task
from fedtune.training import EvaluatedModel, evaluate_model, get_run_context
from tests.federations import words
from tests.technique_steps import IMAGES, LANGUAGE, TEXT, shared

READS = """
version: 2
name: reads
task: text-classification
model: {{source: "path:{folder}/model"}}
data: {{source: "csv:{folder}/texts.csv"}}
devices: [{{count: 1}}]
train: {{batch_size: 4, max_length: 24, local_steps: 1}}
federation: {{rounds: 1}}
"""


def reads(folder: Path, architecture: str, rows: list[str], *overrides: str) -> Recipe:
    """A model of the zoo, and texts for it."""
    write(architecture, folder / "model")
    (folder / "texts.csv").write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return parse_recipe(READS.format(folder=folder), "reads", overrides)


def rows(count: int = 60, length: int = 4) -> list[str]:
    texts = [" ".join(WORDS[(row + 3 * place) % len(WORDS)] for place in range(length)) for row in range(count)]
    return [f"{text},{LABELS[row % 3]}" for row, text in enumerate(texts)]


def edit(folder: Path, **settings: Any) -> None:
    """Change a model's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_a_decoder_pads_as_its_tokenizer_does(tmp_path: Path) -> None:
    """Else the last word of a padded text would be a pad, and its class another."""
    recipe = reads(tmp_path, "llama-classifier", rows())
    edit(tmp_path / "model", pad_token_id=7)
    shop = get_run_context(recipe.model_dump_json())
    model: Any = shop.model.eval()
    assert model.config.pad_token_id == 0
    ids = torch.tensor([[9, 12, 15, 18]])
    padded = torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], 1)
    with torch.no_grad():
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        beside = model(input_ids=padded, attention_mask=(padded > 0).long()).logits
    torch.testing.assert_close(beside, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("names", [("good", "bad"), ("GOOD", "BAD ")])
def test_a_trained_head_keeps_the_order_of_its_classes(tmp_path: Path, names: tuple[str, str]) -> None:
    """The data's names in alphabetical order would turn an accuracy of 100 % into 0."""
    recipe = words(tmp_path)
    config = BertConfig.from_pretrained(tmp_path / "bert", id2label=dict(enumerate(names)))
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    shop = get_run_context(recipe.model_dump_json())
    assert shop.corpus.label_names == ("good", "bad")
    trained = load_file(tmp_path / "bert" / "model.safetensors")
    assert torch.equal(shop.model.get_parameter("classifier.weight"), trained["classifier.weight"])
    first = shop.corpus.train["text"][0]
    assert shop.corpus.train["label"][0] == int(any(word in first for word in ("awful", "dull", "poor", "weak")))


def test_classes_of_other_names_are_in_alphabetical_order(tmp_path: Path) -> None:
    recipe = words(tmp_path)
    assert tasks.load_class_names(recipe) == ()
    edit(tmp_path / "bert", id2label={"0": "sport", "1": "politics"})
    assert tasks.load_class_names(recipe) == ("sport", "politics")
    assert tasks.load_data(recipe, ("sport", "politics")).label_names == ("bad", "good")


@pytest.mark.parametrize(
    ("settings", "made_for"),
    [
        ({"problem_type": "multi_label_classification"}, "several labels per example"),
        ({"problem_type": "regression"}, "a number per example"),
        ({"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}, "a number per example"),
    ],
)
def test_a_head_for_another_kind_of_labels_is_refused(tmp_path: Path, settings: Any, made_for: str) -> None:
    recipe = words(tmp_path)
    edit(tmp_path / "bert", **settings)
    with pytest.raises(ModelError, match=f"bert is made for {made_for}, but text-classification trains one class"):
        models.load_model(recipe.model, TEXT, ("bad", "good"), seed=0)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """transformers makes one up, to which every word is unknown."""
    recipe = words(tmp_path)
    for file in (tmp_path / "bert").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="has a tokenizer that knows no words; put the tokenizer's files into"):
        models.load_tokenizer(recipe.model)


def test_texts_of_unknown_words_are_refused(tmp_path: Path) -> None:
    recipe = reads(tmp_path, "bert", [f"ein anderes Wort {row},{LABELS[row % 3]}" for row in range(60)])
    with pytest.raises(DataError, match=r"its tokenizer knows 0 of the .* words and signs of the examples"):
        _ = get_run_context(recipe.model_dump_json()).train


@pytest.mark.parametrize(("architecture", "most"), [("bert", 32), ("gpt2-classifier", 32), ("roberta", 31)])
def test_a_text_beyond_the_models_positions_is_refused(tmp_path: Path, architecture: str, most: int) -> None:
    recipe = reads(tmp_path, architecture, rows(length=40), "train.max_length=36")
    with pytest.raises(
        ModelError, match=rf"reads at most {most} tokens, but a text has 36 .* set train.max_length to {most}"
    ):
        _ = get_run_context(recipe.model_dump_json()).train
    fits = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_length": most})})
    assert len(get_run_context(fits.model_dump_json()).train)


def test_texts_longer_than_rotary_positions_are_read(tmp_path: Path) -> None:
    recipe = reads(tmp_path, "llama-classifier", rows(length=40), "train.max_length=36")
    assert len(get_run_context(recipe.model_dump_json()).train)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    recipe = reads(
        tmp_path, "bert", [f"word{row % 44} new{row % 2} {WORDS[row // 2]},{LABELS[row % 3]}" for row in range(60)]
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_tokens(["new0", "new1"])
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="its tokenizer has a token number 49, but its embedding only 48 rows"):
        _ = get_run_context(recipe.model_dump_json()).train


@pytest.mark.parametrize("architecture", ["t5", "bart", "mbart"])
def test_texts_for_an_encoder_decoder_end_in_one_end_token(tmp_path: Path, architecture: str) -> None:
    """Its classifier reads the state at the end token, and wants as many in each text."""
    recipe = reads(tmp_path, architecture, [*rows(), f"word1 </s> word2 {'word3 ' * 30},good"])
    shop = get_run_context(recipe.model_dump_json())
    ids = shop.train.make_batch(range(len(shop.train)))["input_ids"]
    assert ((ids == 3).sum(1) == 1).all()
    assert ids.shape[1] <= recipe.train.max_length
    assert evaluate_model(EvaluatedModel(shop.model, TEXT, 8), shop.train)


def test_an_encoder_decoder_whose_padding_is_its_end_is_refused(tmp_path: Path) -> None:
    recipe = reads(tmp_path, "t5", rows())
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "</s>"}))
    with pytest.raises(ModelError, match="without an end token of its own"):
        models.load_tokenizer(recipe.model)


def test_t5_takes_a_head(tmp_path: Path) -> None:
    write("t5", tmp_path / "model")
    model = models.load_model(ModelSettings(source=f"path:{tmp_path / 'model'}"), TEXT, LABELS, seed=0)
    assert isinstance(model, T5ForSequenceClassification)
    assert isinstance(model.config, T5Config)


def of_the_zoo(architecture: str, folder: Path) -> tuple[Any, Task]:
    task = write(architecture, folder)
    labels = () if task == LANGUAGE else LABELS
    return models.load_model(ModelSettings(source=f"path:{folder}"), task, labels, seed=0), task


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # by the first import of peft
@pytest.mark.parametrize(
    ("technique", "architecture", "kind"),
    [
        ("lora", "mixtral", "experts"),
        ("qlora", "mixtral", "experts"),
        ("lora", "qwen2-moe", "experts"),
        ("lora", "regnet", "convolutions"),
    ],
)
def test_lora_says_what_it_passes_over(technique: str, architecture: str, kind: str, tmp_path: Path) -> None:
    model, task = of_the_zoo(architecture, tmp_path)
    said = (
        rf"^{technique} puts no pair beside \d+% of the weights of {type(model).__name__}, which stay frozen: .*{kind}"
    )
    with pytest.warns(UserWarning, match=said):
        shared(technique, model, task)


def test_lora_is_silent_where_all_that_counts_has_a_pair(tmp_path: Path) -> None:
    for architecture in ("bert", "gpt2", "llama"):
        model, task = of_the_zoo(architecture, tmp_path / architecture)
        shared("lora", model, task)


def test_lora_says_so_of_a_net_of_convolutions_alone() -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="bottleneck")
    with pytest.warns(UserWarning, match="stay frozen: convolutions, such as resnet"):
        shared("lora", ResNetForImageClassification(config), IMAGES)
