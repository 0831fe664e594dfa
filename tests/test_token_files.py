"""Tokens in files: batches are those of tokens in memory, found again by what they were made from, whole or absent."""

import itertools
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune import data, tasks
from fedtune.data import splits
from fedtune.data.column import Values
from fedtune.data.encoded_texts import EncodedTexts, pad_rows
from fedtune.data.packed_texts import add_pieces, count_tokens, pack_texts
from fedtune.data.token_files import StoredTexts, write_token_files
from fedtune.device.local_data import summarise_local_data
from fedtune.device.memory_budget import estimate_memory
from fedtune.errors import DataError, FedtuneError, FedtuneWarning, RecipeError
from fedtune.paths import get_cache_folder
from fedtune.recipe.schema import Recipe
from fedtune.recipe.yaml_file import parse_recipe
from fedtune.server.declared import most_examples
from fedtune.simulation import resolve_recipe
from fedtune.tasks import _token_cache
from fedtune.training import RunContext, clear_run_context, get_run_context
from fedtune.training.training_rows import make_training_rows
from tests.federations import execute
from tests.task_cases import save_encoder

_RECIPE = """
version: 2
name: large
task: text-generation
model: {{source: "path:{folder}/model"}}
data: {{source: "jsonl:{folder}/data.jsonl"}}
devices: [{{name: toy, count: 2}}]
train: {{techniques: full, lr: 0.02, batch_size: 8, max_length: 16, local_steps: 2}}
federation: {{rounds: 2}}
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An own one, in which nothing lies yet."""
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))


def recipe(folder: Path, *overrides: str) -> Recipe:
    """A tiny Llama and 90 texts of 2 to 13 words."""
    if not (folder / "model").exists():
        save_encoder(folder / "model")  # for its tokenizer
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            size: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
            LlamaForCausalLM(LlamaConfig(vocab_size=90, num_attention_heads=2, pad_token_id=0, **size)).save_pretrained(
                folder / "model"
            )
        write_texts(folder, 90)
    return resolve_recipe(parse_recipe(_RECIPE.format(folder=folder), "large", overrides))


def write_texts(folder: Path, count: int) -> None:
    rows = [{"text": " ".join(["red cat runs", *(f"n{word}" for word in range(row % 12))])} for row in range(count)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def context(made: Recipe) -> RunContext:
    clear_run_context()
    found = get_run_context(made.model_dump_json())
    clear_run_context()
    return found


@pytest.mark.parametrize("answers", [False, True])
def test_batches_are_those_of_texts_in_memory(tmp_path: Path, answers: bool) -> None:
    rows = [[1, 2, 3], [4], [5, 6, 70_000], [7, 8, 9, 10, 11], [12, 13]]
    labels = [[-100, *row[1:]] for row in rows]

    def texts(places: slice) -> EncodedTexts:
        wanted = pad_rows(labels[places], -100).long() if answers else None
        lengths = torch.tensor([len(row) for row in rows[places]])
        return EncodedTexts(pad_rows(rows[places], 9), lengths, wanted, None, labels_per_token=answers)

    write_token_files(tmp_path / "made", (texts(slice(at, at + 2)) for at in (0, 2, 4)), vocabulary=80_000, padding=9)
    stored, held = StoredTexts(tmp_path / "made"), texts(slice(None))
    assert len(stored) == 5
    assert stored.largest_token == 70_000
    assert stored.count_tokens().sum() == 14
    for indices in ([0], [4, 1, 3], [2, 2], range(5)):
        found, wanted = stored.make_batch(indices), held.make_batch(indices)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], one) and found[name].dtype == one.dtype for name, one in wanted.items())


def test_a_run_from_files_has_the_bits_of_a_run_in_memory(home: Path, tmp_path: Path) -> None:
    made = {kind: recipe(tmp_path, f"data.tokens={kind}") for kind in ("memory", "disk")}
    parts = {kind: context(one) for kind, one in made.items()}
    assert isinstance(parts["disk"].train, StoredTexts)
    assert not isinstance(parts["memory"].train, StoredTexts)
    for part in ("train", "validation", "test"):
        stored, held = (getattr(parts[kind], part) for kind in ("disk", "memory"))
        assert torch.equal(stored.lengths, held.lengths)
    hashes = [execute(one, run=f"run-{kind}").hashes for kind, one in made.items()]
    assert hashes[0] == hashes[1]
    assert len(set(hashes[0])) == 3  # of the start and two rounds


def test_targets_of_conversations_are_those_in_memory(home: Path, tmp_path: Path) -> None:
    recipe(tmp_path)  # writes the model
    rows = [{"prompt": f"red cat n{row % 60}", "completion": " ".join(["runs"] * (1 + row % 4))} for row in range(60)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = "task={text-generation: {format: prompt-completion, chat_template: plain}}"
    stored, held = (context(recipe(tmp_path, task, f"data.tokens={kind}")).train for kind in ("disk", "memory"))
    assert isinstance(stored, StoredTexts)
    found, wanted = (one.make_batch(range(len(stored))) for one in (stored, held))
    assert (wanted["labels"] == -100).any(1).all()
    assert all(torch.equal(found[name], one) for name, one in wanted.items())


def test_conversations_on_the_disk_are_read_in_slices_and_counted_whole(home: Path, tmp_path: Path) -> None:
    recipe(tmp_path)  # writes the model
    rows = [
        {"prompt": f"red cat n{row % 60}", "completion": " ".join(["runs"] * (1 + row % 20)), "tools": None}
        for row in range(900)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = "task={text-generation: {format: prompt-completion, chat_template: plain}}"
    said, batches = {}, {}
    for kind in ("memory", "disk"):
        with pytest.warns(FedtuneWarning, match="longer than train.max_length 16 and are cut") as found:
            train = context(recipe(tmp_path, task, f"data.tokens={kind}")).train
        said[kind] = sorted({str(one.message) for one in found if "longer than" in str(one.message)})
        batches[kind] = train.make_batch(range(len(train)))
    assert said["disk"] == said["memory"]
    assert len(batches["disk"]["labels"]) > 2 * _token_cache._SLICE
    assert all(torch.equal(batches["disk"][name], one) for name, one in batches["memory"].items())
    examples = tasks.load_data(recipe(tmp_path, task, "data.tokens=disk")).train
    assert not isinstance(examples.columns["messages"], Values)  # nothing is kept


def test_a_wrong_conversation_on_the_disk_is_named_by_its_row(home: Path, tmp_path: Path) -> None:
    recipe(tmp_path)
    rows = [{"prompt": f"red cat n{row}", "completion": "runs" if row != 41 else None} for row in range(60)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = "task={text-generation: {format: prompt-completion, chat_template: plain}}"
    for kind in ("memory", "disk"):
        with pytest.raises(DataError, match=r"data\.jsonl: row 42 has no value in column 'completion'; fill it"):
            context(recipe(tmp_path, task, f"data.tokens={kind}"))
    assert not (get_cache_folder() / "tokens").exists()


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_long_text_is_packed_in_pieces(home: Path, tmp_path: Path, kind: str) -> None:
    made = recipe(tmp_path, "train.packing=best-fit", "train.max_length=5", f"data.tokens={kind}")
    shop = context(made)
    texts = list(shop.corpus.train["text"])
    whole = [[*shop.reader(text)["input_ids"], shop.reader.eos_token_id] for text in texts]
    wanted = {row: [ids[at : at + 5] for at in range(0, len(ids), 5)] for row, ids in enumerate(whole)}
    assert len(shop.train) == len(texts) < sum(map(len, wanted.values()))
    assert shop.train.make_batch(range(len(texts)))["input_ids"].shape == (len(texts), 5)  # unpacked, it is cut
    chosen = np.arange(1, len(texts), 3)
    packed = pack_texts(shop.train, chosen, 5, seed=1)
    found = []
    for row in range(len(packed)):
        batch = packed.make_batch([row])
        starts = [*(batch["position_ids"][0] == 0).nonzero()[:, 0].tolist(), batch["input_ids"].shape[1]]
        found += [batch["input_ids"][0, one:end].tolist() for one, end in itertools.pairwise(starts)]
        assert (batch["labels"][0, starts[:-1]] == -100).all()
    assert sorted(found) == sorted(piece for row in chosen for piece in wanted[int(row)])
    assert packed.count_texts(range(len(packed))) == len(chosen)
    assert packed.count_targets(range(len(packed))) == sum(len(piece) - 1 for piece in found)
    assert count_tokens(shop.train, chosen) == sum(map(len, found))


def test_a_stored_run_keeps_cutting_its_texts_and_counting_them(home: Path, tmp_path: Path) -> None:
    new = recipe(tmp_path, "train.packing=best-fit", "train.max_length=5")
    assert (new.train.long_texts, new.train.weigh_by) == ("split", "tokens")
    stored = json.loads(new.model_dump_json())
    del stored["train"]["long_texts"], stored["train"]["weigh_by"]
    old = Recipe.model_validate(stored)
    assert json.loads(old.model_dump_json()) == stored
    shop = context(old)
    assert shop.train.lengths is not None
    assert len(shop.train.lengths) == len(shop.train)
    data = make_training_rows(shop.train, np.arange(len(shop.train)), old.train, lambda _: 0)
    assert data.count_weight(data.rows.tolist()) == len(shop.train)


def test_settings_of_packed_texts_need_packing(home: Path, tmp_path: Path) -> None:
    for setting in ("long_texts=cut", "weigh_by=examples"):
        with pytest.raises(RecipeError, match="is a setting of packed texts, but packing is none; drop one"):
            recipe(tmp_path, f"train.{setting}")


def test_a_packed_federation_weighs_its_clients_by_targets(home: Path, tmp_path: Path) -> None:
    settings = ("train.packing=best-fit", "train.local_steps=null", "train.local_epochs=1", "train.max_length=8")
    made = recipe(tmp_path, *settings, "federation.rounds=1")
    shop = context(made)
    tokens = [count_tokens(shop.train, rows) for rows in shop.client_rows]
    pieces = [len(add_pieces(shop.train, rows)) for rows in shop.client_rows]
    counted = [one.num_examples for one in execute(made, run="packed").rounds[1].client_records]
    assert counted == [count - first for count, first in zip(tokens, pieces, strict=True)]
    assert counted != [len(rows) for rows in shop.client_rows]


def test_targets_that_a_client_reports_are_bounded_by_its_tokens(home: Path, tmp_path: Path) -> None:
    epochs = ("train.local_steps=null", "train.local_epochs=2")
    shop = context(recipe(tmp_path, "train.packing=best-fit", "train.max_length=8", *epochs))
    tokens = [count_tokens(shop.train, rows) for rows in shop.client_rows]
    store: Any = SimpleNamespace(access=SimpleNamespace(list_assignments=lambda _: [], list_devices=list))
    assert [most_examples(shop, store, "run", client) for client in (0, 1)] == [2 * count for count in tokens]
    told = summarise_local_data(shop, shop.client_rows[0])
    assert told == {"examples": len(shop.client_rows[0]), "labels": {}, "tokens": tokens[0]}
    devices = [SimpleNamespace(name=name, profile=json.dumps(one)) for name, one in (("a", told), ("b", {}))]
    assigned = [SimpleNamespace(client=client, device_name=name) for client, name in enumerate("ab")]
    store.access = SimpleNamespace(list_assignments=lambda _: assigned, list_devices=lambda: devices)
    assert [most_examples(shop, store, "run", client) for client in (0, 1)] == [2 * tokens[0]] * 2  # b declared none


def test_a_budget_follows_the_longest_packed_row(home: Path, tmp_path: Path) -> None:
    found = {}
    for packing in ("none", "best-fit"):
        shop = context(recipe(tmp_path, f"train.packing={packing}"))
        assert shop.train.lengths is not None
        short = np.flatnonzero(shop.train.lengths.numpy() <= 8)
        assert len(short) > 4
        found[packing] = estimate_memory(shop, short, 1).bytes_per_example
    assert found["best-fit"] > 1.5 * found["none"]


def test_tokens_are_made_once_and_anew_when_anything_changes(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = context(recipe(tmp_path, "data.tokens=disk")).train
    assert isinstance(first, StoredTexts)
    with monkeypatch.context() as patched:
        patched.setattr(_token_cache, "write_token_files", lambda *_, **__: pytest.fail("tokenised again"))
        patched.setattr(splits, "_places", lambda *_: pytest.fail("split again"))
        again = context(recipe(tmp_path, "data.tokens=disk")).train
    assert isinstance(again, StoredTexts)
    assert again.folder == first.folder
    shorter = context(recipe(tmp_path, "data.tokens=disk", "train.max_length=8")).train
    assert isinstance(shorter, StoredTexts)
    assert shorter.lengths.max() == 8
    assert first.lengths.max() == 16
    write_texts(tmp_path, 60)
    os.utime(tmp_path / "data.jsonl", (1, 1))
    other = context(recipe(tmp_path, "data.tokens=disk")).train
    assert isinstance(other, StoredTexts)
    assert len(other) < len(first)


def test_a_file_of_tokens_is_whole_or_absent(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(tmp_path, "data.tokens=disk")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    shop = context(recipe(tmp_path))
    examples = tasks.load_data(
        made.model_copy(update={"data": made.data.model_copy(update={"tokens": "memory"})})
    ).train
    with pytest.raises(FedtuneError, match="No space left on device; free or choose another place"):
        _token_cache.encode_on_disk(shop.task, examples, made, shop.reader)
    assert not list((get_cache_folder() / "tokens").iterdir())


def test_sources_and_tasks_without_token_files_are_refused(home: Path, tmp_path: Path) -> None:
    made = recipe(tmp_path, "data.tokens=disk")
    other = made.model_copy(update={"data": made.data.model_copy(update={"source": "csv:nowhere.csv"})})
    with pytest.raises(DataError, match="needs jsonl:FILE or parquet:FILE; set it to memory"):
        data.load_data(other, ("text",))
    classes = recipe(tmp_path, "data.tokens=disk", "task=fill-mask")
    with pytest.raises(RecipeError, match="fill-mask keeps its tokens in memory"):
        tasks.encode_examples(tasks.load_data(classes).train, classes, None)
