"""The recipes of the repository: each resolves, each task has one, and the sample made for them fits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedtune.data.conversation_samples import chatterbot, replies
from fedtune.models.sources import resolve_model_source
from fedtune.recipe.task_settings import list_task_names
from fedtune.recipe.yaml_file import read_recipe
from fedtune.simulation import resolve_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_the_repository_resolves(path: Path) -> None:
    recipe = resolve_recipe(read_recipe(path))
    assert recipe.name
    assert resolve_recipe(recipe) == recipe, "a resolved recipe has all its settings"


def test_every_task_has_a_recipe() -> None:
    assert {read_recipe(path).task.name for path in RECIPES} == set(list_task_names())


def test_the_other_reply_belongs_to_another_question_of_the_topic() -> None:
    table, talks = replies()["train"], chatterbot()["train"]
    columns = {name: list(table[name]) for name in ("question", "reply", "other_reply", "group", "domain")}
    given: dict[str, set[str]] = {}
    topics: dict[str, set[str]] = {}
    for messages, group, domain in zip(*(list(talks[name]) for name in ("messages", "group", "domain")), strict=True):
        if messages:
            given.setdefault(group, set()).add(messages[1]["content"])
            topics.setdefault(domain, set()).add(messages[1]["content"])
    assert len(table) > 1900
    for _, reply, other, group, domain in zip(*columns.values(), strict=True):
        assert reply in given[group]
        assert max(len(reply), len(other)) <= 200
        assert other in topics[domain] - given[group]


def test_the_untrained_t5_is_the_same_wherever_it_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from fedtune.models.made_text_models import make_untrained_t5_folder

    folder = resolve_model_source("sample:t5-untrained")
    tokens = AutoTokenizer.from_pretrained(folder)
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    again = make_untrained_t5_folder(Path(folder))
    assert again != Path(folder)
    assert (again / "model.safetensors").read_bytes() == (Path(folder) / "model.safetensors").read_bytes()
    assert tokens("a reply")["input_ids"][-1] == tokens.eos_token_id == 102
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert model.config.decoder_start_token_id == tokens.pad_token_id


def test_the_masked_minilm_has_the_body_and_the_embeddings_of_minilm() -> None:
    made, published = (
        load_file(Path(resolve_model_source(f"sample:{name}")) / "model.safetensors")
        for name in ("minilm-mlm", "minilm")
    )
    body = [name for name in published if name.startswith(("embeddings.", "encoder.")) and "position_ids" not in name]
    assert len(body) > 90
    assert all(torch.equal(made[f"bert.{name}"], published[name]) for name in body)
    assert {name.partition(".")[0] for name in made} == {"bert", "cls"}
