"""Techniques on models of plain blocks: what they train and the bits of a step are those on transformers' models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedtune import techniques
from fedtune.models.blocks.block_model import BlockModel
from fedtune.tasks import Task
from fedtune.techniques import Technique
from tests.block_models import ask_for_step, find_differences, find_task, load_both, make_batch, save_model
from tests.technique_steps import chosen, shake

FOR_ALL: list[tuple[str, dict[str, Any]]] = [
    ("full", {}),
    ("bias", {}),
    ("lora", {}),
    ("lora", {"rank": 3, "alpha": 5.0, "dropout": 0.2, "trained_factors": "both"}),
    ("lora", {"target_modules": ["q_proj", "value", "down_proj"]}),
    ("lora", {"trained_factors": "both-and-base"}),
    ("o-lora", {"visits": [(0, 2), (1, 2)]}),
    ("inf-lora", {"visits": [(0, 2), (1, 2)]}),
    ("meft", {}),
    ("meft", {"variant": "meft1", "num_chunks": 2}),
    ("meft", {"variant": "meft3", "num_chunks": 2, "output_stream": "mean"}),
    ("gradient-checkpointing+lora", {}),
    ("gradient-checkpointing+full", {}),
    ("activation-pruning+full", {}),
    ("activation-pruning+lora", {}),
    ("dynamic-pruning", {"density": 0.5}),
]
FOR_DECODERS: list[tuple[str, dict[str, Any]]] = [
    ("fused-cross-entropy+lora", {"chunk_size": 4}),
    ("fused-cross-entropy+full", {}),
    ("fused-cross-entropy+meft", {}),
    ("error-norm-truncation+lora", {"threshold": 1.0}),
    ("error-norm-truncation+fused-cross-entropy+lora", {"threshold": 1.0}),
    ("chunked-mlp+lora", {"chunk_size": 4}),
    ("chunked-mlp+meft", {"chunk_size": 4}),
]
CASES = [
    *(("llama", *case) for case in [*FOR_ALL, *FOR_DECODERS] if case[0] != "bias"),
    *(("bert", *case) for case in [*FOR_ALL, ("head-only", {})] if case[0] != "bias"),
    ("qwen2", "lora", {}),
    ("qwen2", "bias", {}),
    ("bert", "bias", {}),
]
PAGED = ["lora", "lora+gradient-checkpointing", "meft", "lora+fused-cross-entropy"]


def rewrite(model: nn.Module, units: tuple[Technique, ...], task: Task) -> list[str]:
    names = techniques.apply_techniques(units, model, task, 11)
    shake(model, names)
    techniques.begin_step(units, model, make_batch(model), 1.0)
    return names


def step(model: nn.Module) -> dict[str, Tensor]:
    return ask_for_step(model, make_batch(model))


@pytest.mark.parametrize(("kind", "joined", "settings"), CASES)
def test_a_step_has_the_bits_of_transformers(kind: str, joined: str, settings: dict[str, Any], tmp_path: Path) -> None:
    units = chosen(joined, **settings)
    assert all(unit.fits_plain_blocks for unit in units)
    found, wanted = load_both(save_model(kind, tmp_path / "base"), kind)
    assert isinstance(found, BlockModel)
    task = find_task(tmp_path, kind)
    trained = [rewrite(model, units, task) for model in (found, wanted)]
    assert trained[0] == trained[1]
    assert list(found.state_dict()) == list(wanted.state_dict())
    assert techniques.list_low_rank_pairs(units, found) == techniques.list_low_rank_pairs(units, wanted)
    for number in (1, 2):
        for model in (found, wanted):
            techniques.begin_round(units, model, number)
        ours = step(found)
        assert find_differences(ours, step(wanted)) == [], number
        assert len(ours) > 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("joined", PAGED)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "bert"])
def test_a_step_on_a_paged_base_has_the_bits_of_transformers(
    kind: str, joined: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "bert" and "fused" in joined:
        pytest.skip("no head over a vocabulary")
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    for form in (True, "nf4"):
        found, wanted = load_both(
            save_model(kind, tmp_path / "base", tie_word_embeddings=True), kind, paged=form, dtype=dtype
        )
        for model in (found, wanted):
            rewrite(model, chosen(joined), find_task(tmp_path, kind))
        assert find_differences(step(found), step(wanted)) == [], form
    assert len(list((tmp_path / "cache" / "paged").glob("[!.]*"))) == 2, "both find the same stores"


def test_merged_weights_are_those_of_transformers(tmp_path: Path) -> None:
    found, wanted = load_both(save_model("llama", tmp_path / "base"), "llama")
    units = chosen("lora", rank=3)
    for model in (found, wanted):
        rewrite(model, units, find_task(tmp_path, "llama"))
        techniques.merge_into_weights(units, model)
    assert find_differences(dict(found.named_parameters()), dict(wanted.named_parameters())) == []


def test_a_round_of_bf16_pairs_has_the_type_and_the_bits_of_peft(tmp_path: Path) -> None:
    found, wanted = load_both(save_model("llama", tmp_path / "base"), "llama", dtype="bfloat16")
    for model in (found, wanted):
        rewrite(model, chosen("lora"), find_task(tmp_path, "llama"))
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    assert find_differences(step(found), step(wanted)) == []
