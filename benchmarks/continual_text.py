"""Claim: on a stream of eight text tasks with low-rank pairs, a method without stored data closes most of the gap.

WordNet's noun categories come three at a time; MiniLM learns to name the category of a definition. The gap is that
between naive training and joint training, in the mean accuracy on the test parts of all tasks after the last one.
Settings of the methods were chosen before; the test parts are scored once per border by the runs themselves.

Run: python -m benchmarks.continual_text [--seeds N] [--short]
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.report import save
from fedtune.paths import get_cache_folder
from fedtune.tracking import Store

RECIPE = """
version: 2
name: nouns
task: text-classification
model: {source: "sample:minilm"}
data:
  source: sample:wordnet-nouns
  columns: {text: text, label: label, group: group}
  splits: {validation: 0.1, test: 0.2}
  partition: {kind: iid}
devices: [{name: phone, count: 4, memory: 512MB}]
train: {optimiser: adamw, lr: 3.0e-3, weight_decay: 0, lr_schedule: linear, batch_size: 8, max_length: 48,
  group_by_length: true, local_epochs: 1, techniques: [{lora: {trained_factors: b-only}}]}
evaluation: {every_n_rounds: 1000, batch_size: 32}
stream: {setting: class, loss: seen, tasks: {size: 3, rounds: 2, order: seed}}
"""
ARMS: dict[str, Sequence[str]] = {
    "naive": (),
    "naive, loss new": ("stream.loss=new",),
    "joint": ("stream.memory=[joint]",),
    "analytic": ("stream.memory=[analytic]", "train.techniques=[head-only]"),
    "analytic, first task tuned": ("stream.memory=[{analytic: {tune: first}}]",),
    "analytic ridge, first task tuned": ("stream.memory=[{analytic: {tune: first, head: ridge}}]",),
    "ewc, loss new": ("stream.loss=new", "stream.memory=[ewc]"),
    "lwf, loss new": ("stream.loss=new", "stream.memory=[lwf]"),
    "o-lora, loss new": ("stream.loss=new", "train.techniques=[o-lora]"),
    "inf-lora, loss new": ("stream.loss=new", "train.techniques=[inf-lora]", "stream.memory=[dual-gpm]"),
}
"""What differs from the recipe."""
CACHE = str(get_cache_folder())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", default=";".join(ARMS), help="names with a semicolon between")
    parser.add_argument("--short", action="store_true", help="three tasks of few steps, to try the script")
    given = parser.parse_args()
    rows = []
    for seed in range(given.seeds):
        for arm in given.arms.split(";"):
            changes = [*ARMS[arm], f"seed={seed}"]
            rows.append({"arm": arm, "seed": seed, **run_arm(changes, short=given.short)})
            print(rows[-1], file=sys.stderr, flush=True)
    result = {"seeds": given.seeds, "rows": rows, "arms": summarise(rows)}
    if given.short:
        print(result["arms"])
    else:
        save("continual_text", result)


def run_arm(changes: Sequence[str], *, short: bool) -> dict[str, Any]:
    """Run a recipe in a process of its own, and return its matrix and figures. Seconds are those of the processor."""
    lowered = ["train.local_epochs=null", "train.local_steps=2", "train.max_length=16"] if short else []
    if short:
        tasks = "[{name: a, where: [act, animal], rounds: 2}, {name: b, where: [body, food], rounds: 2}]"
        lowered.append(f"stream.tasks={tasks}")
    with TemporaryDirectory() as home:
        recipe = Path(home, "recipe.yaml")
        recipe.write_text(RECIPE, encoding="utf-8")
        options = [part for change in [*lowered, *changes] for part in ("--set", change)]
        before = os.times()
        subprocess.run(
            [sys.executable, "-m", "fedtune.cli.main", "simulate", str(recipe), "--json", *options],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "FEDTUNE_HOME": home, "FEDTUNE_CACHE": CACHE, "OMP_NUM_THREADS": "1"},
        )
        after = os.times()
        matrix, sent = read_run(Path(home))
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return {**compute_figures(matrix), "bytes_sent": sent, "cpu_seconds": round(seconds), "matrix": matrix}


def read_run(home: Path) -> tuple[list[dict[str, float]], int]:
    """Return the accuracy on each task's test part after each task, and the bytes that all clients sent."""
    os.environ["FEDTUNE_HOME"] = str(home)
    with Store.open() as store:
        rounds = store.rounds(store.run("latest").id)
    rows = []
    for record in rounds:
        scores = {
            one.domain: one.value
            for one in record.metrics
            if one.split == "border" and one.name == "accuracy" and one.domain not in ("all", "mean")
        }
        rows += [scores] if scores and record.number else []
    return rows, sum(one.bytes_up for record in rounds for one in record.client_records)


def compute_figures(matrix: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean accuracy at the end, the mean of R[j, j], and the mean of how far a task fell from its best."""
    names = list(matrix[-1])
    learned = [next(row[name] for row in matrix if name in row) for name in names]
    earlier = {name: [row[name] for row in matrix[:-1] if name in row] for name in names}
    falls = [max(scores) - matrix[-1][name] for name, scores in earlier.items() if scores]
    return {
        "accuracy": float(np.mean(list(matrix[-1].values()))),
        "learning": float(np.mean(learned)),
        "forgetting": float(np.mean(falls)),
    }


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Return means and standard deviations over seeds, and the share of the gap that each arm closes, if known."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    finals = {arm: [row["accuracy"] for row in rows if row["arm"] == arm] for arm in arms}
    low, high = (float(np.mean(finals[arm])) if arm in finals else None for arm in ("naive", "joint"))
    found: dict[str, dict[str, float | None]] = {}
    for arm, final in finals.items():
        own = [row for row in rows if row["arm"] == arm]
        found[arm] = {
            "accuracy": float(np.mean(final)),
            "deviation": float(np.std(final, ddof=1)) if len(final) > 1 else None,
            "learning": float(np.mean([row["learning"] for row in own])),
            "forgetting": float(np.mean([row["forgetting"] for row in own])),
            "gap_closed": _compute_gap_closed(float(np.mean(final)), low, high),
        }
    return found


def _compute_gap_closed(accuracy: float, low: float | None, high: float | None) -> float | None:
    return None if low is None or high is None or high <= low else (accuracy - low) / (high - low)


if __name__ == "__main__":
    main()
