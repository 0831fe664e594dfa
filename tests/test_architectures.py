"""A fast part of the matrix in benchmarks/architectures.py: cells that were wrong or broken once, and their kinds."""

from pathlib import Path

import pytest

from benchmarks.architecture_bench import Bench
from benchmarks.architectures import cell

EXACT = [
    ("bert", "lora"),
    ("t5", "full"),
    ("bart", "lora"),
    ("gpt2", "qlora"),
    ("opt", "fused-head"),
    ("mixtral", "meft"),
    ("phi3", "meft"),
    ("mamba", "qlora"),
    ("mobilenet-v2", "lora"),
    ("levit", "lora"),
]
REFUSED = [("bloom", "residual"), ("swin", "half by half"), ("mobilevit", "half by half")]


@pytest.mark.parametrize(("architecture", "technique"), EXACT)
def test_a_cell_is_exact(architecture: str, technique: str, tmp_path: Path) -> None:
    found = cell(Bench.of(architecture, tmp_path / "model"), technique, tmp_path / "exported")
    assert found.verdict == "exact", found.why
    assert 4 * found.unmoved < found.trained
    assert found.full is not None


def test_layers_that_change_their_weight_before_they_use_it_get_no_pair(tmp_path: Path) -> None:
    """BiT standardises its weights: a product added to them afterwards would be another function."""
    found = cell(Bench.of("bit", tmp_path / "model"), "lora", tmp_path / "exported")
    assert found.why == "BitForImageClassification has no plain linear layer to put a low-rank pair beside; take full"


@pytest.mark.parametrize(("architecture", "why"), REFUSED)
def test_a_model_that_is_no_stack_of_two_halves_is_refused(architecture: str, why: str, tmp_path: Path) -> None:
    found = cell(Bench.of(architecture, tmp_path / "model"), "meft", tmp_path / "exported")
    assert found.verdict == "refused"
    assert why in found.why
