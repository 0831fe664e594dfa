"""Each technique on an accelerator: the card of ``tests.pretend_card``, which refuses what a real one refuses."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.card_rounds import CASES, UNDER_AUTOCAST

pytestmark = pytest.mark.slow

_ROUNDING = 1e-5
"""Attention has other kernels off the CPU, and one that adds in another order is a rounding error away."""

_STEEP = {"deft+lora": 0.05}
"""The gradient of deft's density is steep near zero: rounding of 1e-7 grew to 5e-4 in a step and 3e-2 in two."""

_WAITS: dict[str, set[str]] = {
    "activation-pruning+lora": {"item", "masked_select"},
    "dynamic-pruning": {"item", "mask"},
    "dynamic-pruning+activation-pruning": {"item", "mask", "masked_select"},
    "error-norm-truncation+lora": {"item", "nonzero", "equal"},
    "fused-cross-entropy+lora": {"item", "nonzero"},
    "meft": {"item", "equal"},
}
"""What a step of a technique waits for beside its loss, which is read once, after the round."""

_PLAIN = set(CASES) - {*_WAITS, "deft+lora"}


@pytest.fixture(scope="module")
def rounds() -> dict[str, dict[str, Any]]:
    """Rounds of all cases by data type, from one process, because each has torch to import."""
    command = [sys.executable, "-m", "tests.card_rounds"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    by_type: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return by_type


@pytest.fixture(scope="module")
def found(rounds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return rounds["float32"]


@pytest.mark.parametrize("case", CASES)
def test_a_round_on_a_card_gives_what_it_gives_on_the_cpu(case: str, found: dict[str, Any]) -> None:
    one = found[case]
    assert "failed" not in one, one
    assert one["device_type"] == "card"
    assert one["not_on_cpu"] == []
    near = _STEEP.get(case, _ROUNDING)
    assert one["error"] < near
    assert one["losses"][1] == pytest.approx(one["losses"][0], rel=near)
    assert one["scores"][1] == pytest.approx(one["scores"][0], rel=near, abs=near)
    assert one["extra"][0]


@pytest.mark.parametrize("case", sorted(_PLAIN))
def test_a_step_waits_for_nothing_but_its_loss(case: str, found: dict[str, Any]) -> None:
    asks_for_padding = 1 if CASES[case] in ("a Llama", "a BERT classifier") else 0  # transformers does, in each pass
    assert found[case]["waits_per_step"] == {"item": 1 + asks_for_padding}


@pytest.mark.parametrize("case", sorted(_WAITS))
def test_a_step_waits_for_what_its_technique_needs_alone(case: str, found: dict[str, Any]) -> None:
    assert set(found[case]["waits_per_step"]) <= _WAITS[case]


@pytest.mark.parametrize("case", UNDER_AUTOCAST)
def test_a_model_in_bfloat16_trains_under_autocast(case: str, rounds: dict[str, dict[str, Any]]) -> None:
    one = rounds["bfloat16"][case]
    assert "failed" not in one, one
    assert one["losses"][1] != one["losses"][0]  # losses are in single precision there
    assert one["losses"][1] == pytest.approx(one["losses"][0], rel=1e-2)
