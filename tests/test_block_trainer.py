"""A trainer of a device that builds plain blocks: what it imports, what it holds while it waits, and its bits."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedtune import models
from fedtune.device.local_data import LocalData
from fedtune.device.local_round import read_payload, run_local_round
from fedtune.errors import FedtuneWarning
from fedtune.models.blocks import choice, preference
from fedtune.models.blocks.block_model import BlockModel
from fedtune.models.blocks.choice import PROVEN_VERSIONS
from fedtune.models.plain_tokenizer import PlainTokenizer, find_plain_tokenizer
from fedtune.models.pretrained import load_pretrained_tokenizer
from fedtune.recipe.schema import ModelSettings, Recipe
from fedtune.tasks import get_task
from fedtune.training import clear_run_context, get_model_state, prepare_model
from fedtune.training.resolve import resolve_recipe
from fedtune.wire.client_update import TrainRequest, pack
from fedtune.wire.masked_weights import encode_masked_state
from tests.block_models import save_model

HEAVY = ("transformers", "peft", "bitsandbytes", "sympy", "torch._dynamo", "scipy", "datasets", "pyarrow", "pandas")
TRAIN = f"""
import json, sys
import torch
from pathlib import Path
from fedtune.memory.allocator import fix_mmap_threshold
from fedtune.memory.process_memory import read_resident_memory
fix_mmap_threshold()
bare = read_resident_memory().anonymous
from fedtune.device.trainer import Trainer
from fedtune.device.idle_memory import release_idle_memory
from fedtune.device.trainer_channel import Frame
from fedtune.models.blocks.preference import prefer_plain_blocks
from fedtune.wire.client_update import TrainRequest
prefer_plain_blocks()
order, source, payload, sent = sys.argv[1:]
trainer, order = Trainer(source, 10**11, 0), json.loads(Path(order).read_text())
context, _ = trainer._supply.get_context(TrainRequest(**order))
release_idle_memory(context)
idle = read_resident_memory().anonymous - bare
answer = trainer.run_request(Frame(order, Path(payload).read_bytes()), lambda: None)
assert answer.header["kind"] == "trained", answer.header
Path(sent).write_bytes(answer.payload)
print(json.dumps({{"idle": idle, "loaded": [name for name in {HEAVY!r} if name in sys.modules],
                   "model": type(context.model).__name__}}))
"""
TEXTS = "".join(f"w{3 + number} w{number % 7 + 3} w{number % 5 + 9},{'ab'[number % 2]}\n" for number in range(12))


def make_recipe(folder: Path, kind: str, joined: str, **changes: Any) -> Recipe:
    (folder / "texts.csv").write_text("text,label\n" + TEXTS)
    sizes: dict[str, Any] = {"num_labels": 2} if kind == "bert" else {}
    save_model(kind, folder / "base", **sizes)
    task = "text-classification" if kind == "bert" else "text-generation"
    train = {"techniques": joined, "batch_size": 2, "max_length": 8, "local_steps": 3}
    given = {
        "version": 2,
        "name": "blocks",
        "task": task,
        "model": {"source": f"path:{folder / 'base'}", **changes.pop("model", {})},
        "data": {"source": f"csv:{folder / 'texts.csv'}"},
        "devices": [{"count": 2}],
        "train": train,
        "federation": {"rounds": 2},
        **changes,
    }
    return resolve_recipe(Recipe.model_validate(given))


def run_alone(script: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "FedtuneWarning" not in done.stderr, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "joined", "paged"),
    [
        ("bert", "lora", False),
        pytest.param(  # three processes each
            "llama", "lora+gradient-checkpointing+fused-cross-entropy", "bf16", marks=pytest.mark.deployed
        ),
        pytest.param("llama", "meft", False, marks=pytest.mark.deployed),
        pytest.param("bert", "meft", True, marks=pytest.mark.deployed),
    ],
)
def test_a_trainer_of_blocks_imports_nothing_heavy_and_sends_the_bits_of_transformers(
    kind: str, joined: str, paged: Any, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    recipe = make_recipe(tmp_path, kind, joined, model={"paged": paged})
    labels = json.dumps(["a", "b"] if kind == "bert" else [])
    order, source = TrainRequest(recipe.model_dump_json(), 1, 0, "run", labels), f"csv:{tmp_path / 'texts.csv'}"
    context, rows = LocalData(source).get_context(order)
    assert not isinstance(context.model, BlockModel), "a process builds them only if it prefers them"
    payload = pack(encode_masked_state(get_model_state(context.model, context.shared_names)))
    deltas, _ = run_local_round(order, read_payload(payload, context, 0), context, rows, tmp_path / "own")
    clear_run_context()
    (tmp_path / "order").write_text(json.dumps(vars(order)))
    (tmp_path / "payload").write_bytes(payload)
    found = run_alone(TRAIN, str(tmp_path / "order"), source, str(tmp_path / "payload"), str(tmp_path / "sent"))
    assert found["model"] == ("TextClassifier" if kind == "bert" else "LanguageModel")
    assert found["loaded"] == []
    assert (tmp_path / "sent").read_bytes() == deltas
    assert found["idle"] < 24e6, f"{found['idle'] / 1e6:.1f} MB above import torch, of a model without weight"


@pytest.fixture
def preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preference, "_preferred", [True])


def test_the_installed_transformers_is_one_that_the_blocks_are_compared_with() -> None:
    assert choice._find_version().startswith(PROVEN_VERSIONS)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("joined", "changes", "reason"),
    [
        ("lora+selective-checkpointing", {}, "selective-checkpointing was not made for plain blocks"),
        ("qlora", {}, "qlora was not made for plain blocks"),
        ("lora", {"model": {"position_interpolation": 2}}, "its positions are interpolated"),
    ],
)
def test_a_recipe_that_needs_transformers_gets_its_model_and_says_why(
    joined: str, changes: dict[str, Any], reason: str, tmp_path: Path, preferred: None
) -> None:
    recipe = make_recipe(tmp_path, "llama", joined, **changes)
    with pytest.warns(FedtuneWarning, match=f"is built by transformers, .* because {reason}"):
        model, _, _ = prepare_model(recipe, ())
    assert not isinstance(model, BlockModel)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"position_embedding_type": "relative_key_query"}, 'says position_embedding_type: "relative_key_query"'),
        ({"model_type": "roberta"}, "it is a roberta model for text-classification"),
        ({"quantization_config": {"bits": 4}}, "says quantization_config"),
    ],
)
def test_a_configuration_with_another_function_is_told(
    change: dict[str, Any], reason: str, tmp_path: Path, preferred: None
) -> None:
    folder = save_model("bert", tmp_path / "base")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | change))
    model = ModelSettings(source=f"path:{folder}")
    with pytest.warns(FedtuneWarning, match=reason):
        found = choice.find_block_model(
            model, str(folder), get_task("text-classification"), ("a", "b", "c"), seed=1, problem=None
        )
    assert found is None


def test_a_folder_with_an_adapter_and_one_on_the_hub_are_left_to_transformers(tmp_path: Path, preferred: None) -> None:
    folder = save_model("llama", tmp_path / "base")
    (folder / "adapter_config.json").write_text("{}")
    for location, reason in ((str(folder), "an adapter"), ("owner/name", "from the hub")):
        with pytest.warns(FedtuneWarning, match=reason):
            found = choice.find_block_model(
                ModelSettings(source=f"path:{folder}"), location, get_task("text-generation"), (), seed=1, problem=None
            )
        assert found is None


def test_a_model_of_blocks_is_loaded_where_it_is_preferred(tmp_path: Path, preferred: None) -> None:
    settings = ModelSettings(source=f"path:{save_model('llama', tmp_path / 'base')}")
    assert isinstance(models.load_model(settings, get_task("text-generation"), (), seed=1), BlockModel)


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    ["path", *(pytest.param(f"sample:{name}", marks=pytest.mark.deployed) for name in ("minilm", "smollm2"))],
)
def test_a_plain_tokenizer_has_the_tokens_of_transformers(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source == "path":
        source = f"path:{save_model('llama', tmp_path / 'base')}"
    settings = ModelSettings(source=source)
    location = models.sources.resolve_model_source(source)
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    wanted, found = load_pretrained_tokenizer(settings, location), find_plain_tokenizer(Path(location))
    assert isinstance(found, PlainTokenizer)
    texts = ["w5 W6 [END] [PAD]", "", "naïve  Ünïcode \t 漢字 🙂 <|im_end|> [SEP]", "a long text " * 40]
    for pairs in (None, texts[::-1]):
        for length in (5, 16, 512):
            ours, theirs = (one(texts, pairs, truncation=True, max_length=length) for one in (found, wanted))
            assert all(ours[name] == theirs[name] for name in ours)
            assert ("token_type_ids" in ours) is ("token_type_ids" in theirs)
    for name in ("pad_token_id", "eos_token_id", "unk_token_id", "all_special_ids"):
        assert getattr(found, name) == getattr(wanted, name)
    for pair in (True, False):
        assert found.num_special_tokens_to_add(pair) == wanted.num_special_tokens_to_add(pair)
    assert len(found) == len(wanted)
    assert found.decode([5, 6]) == wanted.decode([5, 6]), "asked of transformers' tokenizer"
    assert found("w5", verbose=False)["input_ids"] == wanted("w5", verbose=False)["input_ids"]


@pytest.mark.deployed
def test_an_idle_trainer_of_smollm2_takes_at_most_32_mb(tmp_path: Path, home: Path) -> None:
    joined = "lora+gradient-checkpointing+fused-cross-entropy"
    recipe = make_recipe(tmp_path, "llama", joined, model={"source": "sample:smollm2", "paged": "bf16"})
    order, source = TrainRequest(recipe.model_dump_json(), 1, 0, "run", "[]"), f"csv:{tmp_path / 'texts.csv'}"
    context, _ = LocalData(source).get_context(order)
    payload = pack(encode_masked_state(get_model_state(context.model, context.shared_names)))
    clear_run_context()
    (tmp_path / "order").write_text(json.dumps(vars(order)))
    (tmp_path / "payload").write_bytes(payload)
    found = run_alone(TRAIN, str(tmp_path / "order"), source, str(tmp_path / "payload"), str(tmp_path / "sent"))
    assert found["loaded"] == []
    assert found["idle"] <= 32e6, f"{found['idle'] / 1e6:.1f} MB"
