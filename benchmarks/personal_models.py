"""Claim: where each client holds two classes, a personal model is at least 5 points better than the shared one.

Handwritten digits (``mnist-5k``), logistic regression, twenty clients with two shards of about one class each, all in
every round. A client holds out a quarter of its pictures and scores after the last round: ``shared`` scores the model
of FedAvg, the others each client's own. ``alone`` is Ditto without the pull to the shared model. Mean client and mean
of the worst tenth, in percent. The rate of each arm is the best of RATES with another seed, whose shards and held-out
pictures are others.

Run: python -m benchmarks.personal_models [--seeds 3] [--rounds 20]
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np

import fedtune
from benchmarks.report import save

CLIENTS, SEARCHED = 20, 100
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
RECIPE: dict[str, Any] = {
    "version": 2,
    "name": "personal",
    "task": "image-classification",
    "model": {"source": "sample:logistic"},
    "data": {"source": "sample:mnist-5k", "partition": {"kind": "shards", "shards_per_client": 2}},
    "devices": [{"name": "phone", "count": CLIENTS}],
    "train": {
        "techniques": ["full"],
        "optimiser": "sgd",
        "lr_schedule": "constant",
        "batch_size": 16,
        "image_size": 28,
        "local_steps": 10,
    },
    "evaluation": {"every_n_rounds": 1000, "local_holdout": 0.25, "clients": "all"},
}
ARMS: dict[str, Any] = {
    "shared": None,
    "ditto": {"ditto": {}},
    "apfl": {"apfl": {}},
    "apfl, adaptive": {"apfl": {"adaptive": True}},
    "alone": {"ditto": {"lam": 0}},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as home:
        os.environ["FEDTUNE_HOME"] = home
        for arm in ARMS:
            tried = {rate: run_arm(arm, rate, SEARCHED, given.rounds)["mean"] for rate in RATES}
            rate = max(tried, key=lambda one: tried[one])
            rows += [{**run_arm(arm, rate, seed, given.rounds), "tried": tried} for seed in range(given.seeds)]
    save("personal_models", {"rounds": given.rounds, "rows": rows, "arms": {arm: average(rows, arm) for arm in ARMS}})


def run_arm(arm: str, rate: float, seed: int, rounds: int) -> dict[str, Any]:
    """Return the mean client's accuracy and that of the worst tenth after the last round."""
    federation = {"rounds": rounds, **({"algorithm": ARMS[arm]} if ARMS[arm] else {})}
    recipe = {**RECIPE, "seed": seed, "federation": federation, "train": {**RECIPE["train"], "lr": rate}}
    started = time.process_time()
    run = fedtune.simulate(recipe, workers=1)
    moment = "after" if ARMS[arm] else "shared"
    last = run.rounds[-1].client_scores
    scores = sorted(100 * one.value for one in last if (one.moment, one.name) == (moment, "accuracy"))
    assert len(scores) == CLIENTS
    found = {
        "arm": arm,
        "rate": rate,
        "seed": seed,
        "mean": round(float(np.mean(scores)), 2),
        "worst_tenth": round(float(np.mean(scores[: CLIENTS // 10])), 2),
        "cpu_seconds": round(time.process_time() - started, 1),
    }
    print(found, file=sys.stderr, flush=True)
    return found


def average(rows: list[dict[str, Any]], arm: str) -> dict[str, float]:
    """Means over seeds."""
    own = [row for row in rows if row["arm"] == arm]
    return {
        "rate": own[0]["rate"],
        "mean": round(statistics.fmean(row["mean"] for row in own), 2),
        "deviation": round(statistics.stdev(row["mean"] for row in own), 2) if len(own) > 1 else 0.0,
        "worst_tenth": round(statistics.fmean(row["worst_tenth"] for row in own), 2),
    }


if __name__ == "__main__":
    main()
