"""Figures over very few of a device's examples stay on the device."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedtune.data import Table, Values
from fedtune.data.column import objects
from fedtune.device.local_data import summarise_local_data
from fedtune.device.local_round import read_payload, run_local_round
from fedtune.training import RunContext, clear_run_context, get_model_state, get_run_context
from fedtune.wire.client_update import FEWEST, ClientReport, TrainRequest, pack
from fedtune.wire.masked_weights import encode_masked_state
from tests.federations import trivial
from tests.task_cases import task_recipe


def report(home: Path, rows: int, *overrides: str) -> ClientReport:
    recipe = trivial(*overrides).model_dump_json()
    clear_run_context()
    shop = get_run_context(recipe)
    payload = pack(encode_masked_state(get_model_state(shop.model, shop.shared_names)))
    return run_local_round(
        TrainRequest(recipe, 1, 0, "run"),
        read_payload(payload, shop, 0),
        shop,
        shop.client_rows[0][:rows],
        home / "own",
    )[1]


@pytest.mark.parametrize(("rows", "told"), [(FEWEST, True), (FEWEST - 1, False), (1, False)])
def test_the_loss_over_few_examples_is_not_told(home: Path, rows: int, told: bool) -> None:
    assert math.isfinite(report(home, rows).loss) == told


@pytest.mark.parametrize(("rows", "told"), [(2 * FEWEST, True), (2 * FEWEST - 2, False)])
def test_a_score_over_few_held_out_examples_is_not_told(home: Path, rows: int, told: bool) -> None:
    found = report(home, rows, "evaluation.local_holdout=0.5")
    assert (found.num_holdout_predictions, found.holdout_loss != 0) == ((FEWEST, True) if told else (0, False))


@pytest.mark.parametrize("column", ["label", "labels", "tags"])
def test_a_class_with_few_examples_is_not_counted(column: str) -> None:
    """An example that has a class twice, such as two words with a tag, counts once."""
    numbers = [0] * 9 + [1] * FEWEST + [2] * (FEWEST - 1) + [3]
    values = Values(np.array(numbers)) if column == "label" else Values(objects([[one, one] for one in numbers]))
    corpus = SimpleNamespace(train=Table({column: values}), label_names=("a", "b", "c", "d", "e"))
    task = SimpleNamespace(columns=("text", column))
    shop: Any = SimpleNamespace(recipe=trivial(), corpus=corpus, task=task)
    typed: RunContext = shop
    assert summarise_local_data(typed, np.arange(len(numbers))) == {
        "examples": len(numbers),
        "labels": {"a": 9, "b": FEWEST},
    }


def test_a_task_without_classes_has_none_to_count(home: Path, tmp_path: Path) -> None:
    shop = get_run_context(task_recipe("text-classification, number", tmp_path).model_dump_json())
    assert summarise_local_data(shop, np.arange(20)) == {"examples": 20, "labels": {}}
