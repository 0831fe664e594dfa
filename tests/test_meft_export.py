"""A MEFT model leaves fedtune with its code, gives the same logits elsewhere, and never passes for a plain one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedtune import models, techniques
from fedtune.errors import ModelError
from fedtune.export import export_model
from fedtune.techniques import Technique
from tests.federations import execute, words
from tests.meft_models import a_batch, made
from tests.technique_steps import LANGUAGE, TEXT, chosen, logits, shake
from tests.test_export import assert_same_logits, own_logits, state


def exported(family: str, joined: str, folder: Path, **settings: Any) -> torch.Tensor:
    """Write a model that moved from its start; returns what it says of ``a_batch``."""
    model, task = made(family)
    applied: tuple[Technique, ...] = chosen(joined, **settings)
    shake(model, techniques.apply_techniques(applied, model, task, 0))
    batch = a_batch(task)
    del batch["labels"]
    wanted = logits(model, batch)
    for technique in applied:
        technique.merge_into_weights(model)
    models.save_model(model, (), folder)
    return wanted


@pytest.mark.parametrize("joined", ["meft", "lora+meft", "meft+lora", "meft+full"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_plain_transformers_gives_the_same_logits(family: str, joined: str, tmp_path: Path) -> None:
    wanted = exported(family, joined, tmp_path / "out")
    auto = AutoModelForCausalLM if family == "llama" else AutoModelForSequenceClassification
    loaded = auto.from_pretrained(tmp_path / "out", trust_remote_code=True)
    batch = a_batch(LANGUAGE if family == "llama" else TEXT)
    del batch["labels"]
    assert_same_logits(loaded, batch, wanted)
    if joined == "meft":
        assert torch.equal(logits(loaded, batch), wanted)


@pytest.mark.parametrize("variant", ["meft1", "meft2", "meft3"])
def test_every_variant_and_mode(variant: str, tmp_path: Path) -> None:
    for settings in ({}, {"mode": "float", "factor": 0.1, "merge": "mean"}):
        folder = tmp_path / f"{len(settings)}"
        wanted = exported("bert", "meft", folder, variant=variant, **settings)
        loaded = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
        batch = a_batch(TEXT)
        del batch["labels"]
        assert torch.equal(logits(loaded, batch), wanted)


def test_a_loaded_model_can_be_saved_again(tmp_path: Path) -> None:
    wanted = exported("llama", "meft", tmp_path / "one")
    AutoModelForCausalLM.from_pretrained(tmp_path / "one", trust_remote_code=True).save_pretrained(tmp_path / "two")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "two", trust_remote_code=True)
    batch = a_batch(LANGUAGE)
    del batch["labels"]
    assert torch.equal(logits(loaded, batch), wanted)


def test_the_folder_needs_no_fedtune_and_is_not_taken_for_a_plain_model(tmp_path: Path) -> None:
    exported("bert", "meft", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "meft-bert"
    code = f"""
import sys, transformers
load = transformers.AutoModelForSequenceClassification.from_pretrained
load({str(tmp_path / "out")!r}, trust_remote_code=True)
assert not any(name.split(".")[0] in ("fedtune", "peft", "bitsandbytes") for name in sys.modules)
try:
    load({str(tmp_path / "out")!r}, trust_remote_code=False)
except ValueError:
    print("refused")
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout == "refused\n"


def test_a_run_with_meft_is_exported(home: Path, tmp_path: Path) -> None:
    recipe = words(tmp_path, "train.techniques=meft")
    tensors = state(execute(recipe))
    assert export_model(recipe, tensors, tmp_path / "out", None, "# a card\n") == "model"
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", trust_remote_code=True)
    inputs, expected = own_logits(recipe, tensors)
    assert_same_logits(loaded, inputs, expected)
    assert loaded.config.id2label == {0: "bad", 1: "good"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert len(tokenizer("the film was great")["input_ids"]) == 4
    with pytest.raises(
        ModelError, match="meft trains tensors that no PEFT adapter can contain; export with --format model"
    ):
        export_model(recipe, tensors, tmp_path / "adapter", "adapter", "")
