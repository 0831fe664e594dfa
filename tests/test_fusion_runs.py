"""What fedtune's own runs learned, merged by their names."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from fedtune.cli.exported import exported
from fedtune.errors import StoreError
from fedtune.fusion import MergeConfig, merge, prepare
from fedtune.models.quiet import quiet
from tests.federations import execute, words
from tests.fusion_models import tensors


def test_a_run_is_merged_with_its_own_start_as_the_base(home: Path, tmp_path: Path) -> None:
    recipe = words(tmp_path, "train.techniques=full")
    execute(recipe)
    config = MergeConfig.model_validate(
        {
            "merge_method": "task_arithmetic",
            "base_model": "run:run-1@0",
            "models": [{"model": "run:latest", "parameters": {"weight": 0.5}}],
        }
    )
    merge(prepare(config, lambda name: exported(name, None)), tmp_path / "out", "a card")
    before, after = tensors(exported("run-1@0", None)), tensors(exported("run-1", None))
    for name, tensor in tensors(tmp_path / "out").items():
        torch.testing.assert_close(tensor, (before[name] + after[name]) / 2, rtol=0, atol=1e-6)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    with quiet():
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")


def test_what_is_no_round_is_refused(home: Path) -> None:
    with pytest.raises(StoreError, match="'last' is no round; write run:ID@ROUND"):
        exported("run-1@last", None)
