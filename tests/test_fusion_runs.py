"""What fedtune's own runs learned, merged by their names."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from fedtune.errors import StoreError
from fedtune.library.cached_export import export_run_to_cache
from fedtune.models.transformers_logging import silence_transformers
from fedtune.offline_merge import MergeConfig, prepare_merge, write_merged_model
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
    write_merged_model(prepare_merge(config, lambda name: export_run_to_cache(name, None)), tmp_path / "out", "a card")
    before, after = tensors(export_run_to_cache("run-1@0", None)), tensors(export_run_to_cache("run-1", None))
    for name, tensor in tensors(tmp_path / "out").items():
        torch.testing.assert_close(tensor, (before[name] + after[name]) / 2, rtol=0, atol=1e-6)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    with silence_transformers():
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")


def test_what_is_no_round_is_refused(home: Path) -> None:
    with pytest.raises(StoreError, match="'last' is not a round number; write run:ID@ROUND"):
        export_run_to_cache("run-1@last", None)
