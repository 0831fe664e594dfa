"""The page that compares runs: groups by seed, and differences with the interval of the paired t test."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel
from starlette.testclient import TestClient

from fedtune.tracking import Store
from fedtune.web.paired_difference import compute_paired_difference
from tests.page_examples import open_page
from tests.store_examples import a_metric, a_round, start

ATTACK = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
VALUES = {0.1: [0.80, 0.82, 0.85], 0.2: [0.90, 0.93, 0.94], 0.3: [0.80, 0.83, 0.84]}


def add_run(store: Store, lr: float, seed: int, value: float, name: str = "film") -> str:
    """A completed run of three rounds whose test accuracy is ``value``."""
    run_id = f"r{lr}-{seed}-{name[:4]}"
    start(store, run_id, name=name, seed=seed, recipe=json.dumps({"name": name, "seed": seed, "train": {"lr": lr}}))
    for number in range(4):
        scores = (a_metric(number / 10 + seed), a_metric(1 - value, name="loss"), a_metric(value, split="test"))
        store.commit_round(run_id, a_round(number, metrics=scores[: 3 if number == 3 else 1]))
    store.finish(run_id, "completed")
    return run_id


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[tuple[Store, TestClient, list[str]]]:
    with open_page(tmp_path / "store.sqlite") as (store, client):
        ids = [add_run(store, lr, seed, value) for lr, row in VALUES.items() for seed, value in enumerate(row)]
        yield store, client, ids


@pytest.mark.parametrize("count", [2, 3, 5, 30])
def test_the_interval_is_that_of_the_paired_t_test(count: int) -> None:
    generator = np.random.default_rng(count)
    base, other = generator.normal(size=count), generator.normal(0.5, size=count)
    found = compute_paired_difference(dict(enumerate(base)), dict(enumerate(other)) | {99: 5.0})
    assert found is not None
    expected = ttest_rel(other, base).confidence_interval(0.95)
    assert found.pairs == count
    assert found.mean == pytest.approx(float((other - base).mean()))
    assert found.low == pytest.approx(float(expected.low))
    assert found.high == pytest.approx(float(expected.high))
    assert found.is_clear == (expected.low > 0 or expected.high < 0)


def test_one_seed_has_no_interval_and_none_no_difference() -> None:
    found = compute_paired_difference({1: 0.5, 2: 0.5}, {2: 0.75, 3: 1.0})
    assert found is not None
    assert (found.pairs, found.mean, found.is_clear) == (1, 0.25, False)
    assert math.isnan(found.low)
    assert compute_paired_difference({1: 0.5}, {2: 0.5}) is None


def test_runs_that_differ_in_seed_alone_are_one_setting(opened: tuple[Store, TestClient, list[str]]) -> None:
    _, client, ids = opened
    text = client.get(f"/compare?runs={','.join(ids)}").text
    table = re.search(r"Results by setting.*?</table>", text, re.DOTALL)
    assert table is not None
    rows = re.findall(r"<tr>(<th scope=\"row\">.*?)</tr>", table[0], re.DOTALL)
    cells = [re.sub(r"<[^>]*>|\s+", " ", row) for row in rows]
    assert len(cells) == 3
    assert "film, lr 0.1" in cells[0]
    assert "baseline" in cells[0]
    assert ".823" in cells[0]
    interval = ttest_rel(VALUES[0.2], VALUES[0.1]).confidence_interval(0.95)
    assert f"{interval.low:.3f} to {interval.high:.3f}".replace("0.", ".") in cells[1]
    assert "film, lr 0.2 is better than film, lr 0.1 by .100" in text
    assert "film, lr 0.3 differs from film, lr 0.1 by .000, and the interval includes 0" in text
    assert re.search(r"<code>train.lr</code></th><td><code>0.1</code></td><td><code>0.2</code>", text)


def test_the_baseline_and_the_metric_are_chosen(opened: tuple[Store, TestClient, list[str]]) -> None:
    _, client, ids = opened
    text = client.get(f"/compare?runs={','.join(ids)}&base={ids[3]}&metric=loss").text
    assert "film, lr 0.1 is worse than film, lr 0.2 by 0.100" in text
    assert client.get(f"/compare?runs={','.join(ids)}&metric=f1").status_code == 400


def test_curves_are_means_over_seeds(opened: tuple[Store, TestClient, list[str]]) -> None:
    _, client, ids = opened
    text = client.get("/compare", params=[("runs", one) for one in ids[:6]]).text
    rows = re.findall(r'<tr><th scope="row" class="n">(\d)</th><td class="n">([^<]*)</td><td class="n">([^<]*)', text)
    assert rows == [(str(n), f"{1 + n / 10:.3f}", f"{1 + n / 10:.3f}") for n in range(4)]


def test_what_is_left_out_is_said(opened: tuple[Store, TestClient, list[str]]) -> None:
    store, client, ids = opened
    start(store, "stopped-1", seed=0, recipe=json.dumps({"train": {"lr": 0.2}}))
    store.commit_round("stopped-1", a_round(0))
    store.commit_round("stopped-1", a_round(1, metrics=(a_metric(0.99, split="test"),)))
    store.finish("stopped-1", "failed", "out of memory")
    again = add_run(store, 0.1, 0, 0.5, "newer")
    text = client.get(f"/compare?runs={','.join([*ids[:6], 'stopped-1', again])}").text
    assert "Not completed, and so in no difference: stopped-1." in text
    assert f"counts instead of {ids[0]}." in text
    assert ".723" in text, "the mean has the newer run of seed 0"


def test_fewer_than_two_runs_are_asked_for_and_too_many_refused(opened: tuple[Store, TestClient, list[str]]) -> None:
    _, client, ids = opened
    for address in ("/compare", "/compare?runs=", f"/compare?runs={ids[0]}", f"/compare?runs={ids[0]},{ids[0]}"):
        assert "Choose two or more runs" in client.get(address).text
    assert client.get(f"/compare?runs={','.join(map(str, range(51)))}").status_code == 400
    assert client.get(f"/compare?runs={ids[0]},none").status_code == 404
    assert "differ in their seed alone" in client.get(f"/compare?runs={ids[0]},{ids[1]}").text


def test_stored_text_is_escaped_in_a_comparison(opened: tuple[Store, TestClient, list[str]]) -> None:
    store, client, ids = opened
    start(store, "bad-1", name=ATTACK, recipe=json.dumps({"name": ATTACK, ATTACK: ATTACK}))
    store.commit_round("bad-1", a_round(0, metrics=(a_metric(0.5, name=ATTACK[:64]),)))
    for address in (f"runs={ids[0]},bad-1", f"runs={ids[0]},{ATTACK}", f"runs={ids[0]},bad-1&metric={ATTACK}"):
        text = client.get(f"/compare?{address}").text
        assert "<script" not in text
        assert "<img" not in text
