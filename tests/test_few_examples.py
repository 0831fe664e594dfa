"""Figures over very few of a device's examples stay on the device."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from fedtune.contribution import FEWEST, Order, Report, pack
from fedtune.device.supply import holding
from fedtune.device.work import read_payload, work
from fedtune.sparse import to_wire
from fedtune.training import Workshop, discard, read_state, workshop
from tests.federations import trivial


def report(home: Path, rows: int, *overrides: str) -> Report:
    recipe = trivial(*overrides).model_dump_json()
    discard()
    shop = workshop(recipe)
    payload = pack(to_wire(read_state(shop.model, shop.shared)))
    return work(Order(recipe, 1, 0), read_payload(payload, shop, 0), shop, shop.clients[0][:rows], home / "own")[1]


@pytest.mark.parametrize(("rows", "told"), [(FEWEST, True), (FEWEST - 1, False), (1, False)])
def test_the_loss_over_few_examples_is_not_told(home: Path, rows: int, told: bool) -> None:
    assert math.isfinite(report(home, rows).loss) == told


@pytest.mark.parametrize(("rows", "told"), [(2 * FEWEST, True), (2 * FEWEST - 2, False)])
def test_a_score_over_few_held_out_examples_is_not_told(home: Path, rows: int, told: bool) -> None:
    found = report(home, rows, "evaluation.own=0.5")
    assert (found.own_predictions, found.own_loss != 0) == ((FEWEST, True) if told else (0, False))


def test_a_class_with_few_examples_is_not_counted() -> None:
    labels = [0] * 9 + [1] * FEWEST + [2] * (FEWEST - 1) + [3]
    corpus = SimpleNamespace(train=Dataset.from_dict({"label": labels}), labels=("a", "b", "c", "d", "e"))
    shop: Any = SimpleNamespace(recipe=trivial(), corpus=corpus)
    typed: Workshop = shop
    assert holding(typed, np.arange(len(labels))) == {"examples": len(labels), "labels": {"a": 9, "b": FEWEST}}
