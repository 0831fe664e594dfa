"""Each technique on an accelerator: the card of ``tests.pretend_card``, which refuses what a real one refuses."""

import json
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from tests.card_rounds import CASES, UNDER_AUTOCAST
from tests.card_uses import PREPARED

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
    """Rounds of all cases by data type, and other uses, from one process, because each has torch to import."""
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


@pytest.fixture(scope="module")
def uses(rounds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return rounds["uses"]


@pytest.mark.parametrize("units", PREPARED)
def test_a_prepared_model_trains_is_saved_and_merged_on_the_card_that_it_is_on(
    units: str, uses: dict[str, Any]
) -> None:
    one = uses["prepared"][units]
    assert "failed" not in one, one
    assert one["elsewhere"] == 0  # parameters, buffers and the optimiser's, while it trains and when it is merged
    assert max(one["error"], one["logits"], one["saved"], one["merged"]) < 1e-9
    assert one["learnt"] > 0.1
    (kept, _, gradients), (kept_there, _, gradients_there) = one["memory"]
    assert gradients_there == gradients > 0
    assert kept_there == pytest.approx(kept, rel=0.05)  # attention has another kernel


def test_state_dicts_of_a_card_are_merged_on_the_cpu(uses: dict[str, Any]) -> None:
    assert uses["merged states"] == {"places": ["cpu"], "equal": True}


def test_the_models_of_a_merge_compute_on_the_card(uses: dict[str, Any]) -> None:
    """To align, to relax, to renormalise, and four that are scored: on the CPU and on the card the same."""
    one = uses["merged folders"]
    assert "failed" not in one, one
    assert one["error"] < 1e-6 < one["moved"]
    assert one["models"] > 5  # the base for its activations, the base and the inputs for scores, and the result
    wanted, found = (list(scores.values()) for scores in one["scores"])
    assert found == [[metric | {"value": pytest.approx(metric["value"], rel=1e-5)} for metric in one] for one in wanted]


def test_a_profile_on_a_card_measures_and_checks_there(uses: dict[str, Any]) -> None:
    one = uses["profiled"]
    assert "failed" not in one, one
    wanted, found = one["wanted"], one["found"]
    assert (wanted["device_type"], found["device_type"]) == ("cpu", "card")
    assert found["kept_bytes"] == pytest.approx(wanted["kept_bytes"], rel=0.25)  # attention has another kernel
    assert [found[key] for key in ("trainable", "wire_bytes")] == [wanted[key] for key in ("trainable", "wire_bytes")]
    assert found["gradient_error"] == 0


def test_a_simulation_on_a_card_trains_and_scores_there_and_the_store_says_so(uses: dict[str, Any]) -> None:
    one = uses["simulated"]
    assert "failed" not in one, one
    cpu, card = one["metrics"]
    assert card == [[*told, pytest.approx(value, rel=1e-5)] for *told, value in cpu]
    assert {moment for _, _, moment, *_ in cpu} >= {"all", "before", "after", "shared"}
    assert [set(devices) for devices in one["devices"]] == [{"cpu"}, {"card"}]


def test_clients_in_turn_share_the_base_on_the_card(uses: dict[str, Any]) -> None:
    """The model is sent once, for the server and all clients. A turn sends the shared tensors into it, those that it
    trains to compare them with the start, and batches of three tensors.
    """
    one = uses["simulated"]
    model, arrived = Counter(one["model"]), one["arrived"]
    assert Counter(arrived[: len(one["model"])]) == model
    assert max(arrived[len(one["model"]) :]) < max(one["model"])
    turns = {tuple(order): Counter(sizes) for order, sizes in one["turns"][:3]}
    assert turns.keys() == {(1, client) for client in range(3)}
    for sizes in turns.values():
        own = Counter(one["shared"] + one["trained"])
        assert own <= sizes
        batches = sizes - own
        assert batches.total() % 3 == 0
        assert sum(batches.elements()) < 0.1 * sum(one["model"])
