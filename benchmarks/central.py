"""Claim: the demo federation ends within 2 points of training in one place with as many gradient steps.

For each seed: `fedtune simulate recipes/sentiment.yaml`, then a bare loop on all training examples together, counted in
the two ways the words allow:
in step   rounds x steps, each on as many examples as all clients process in one of theirs: as many steps one after the
          other, and as many examples. This is the claim.
in total  rounds x steps x clients steps of one client's batch: as many examples again, but eight times as many updates
          one after the other, which no averaging can make up for.
The bare loop trains what the recipe trains (``same``, the claim), or LoRA with both factors (``lora``): it is stronger.
The mean test accuracy over the four domains is compared. Splits do not depend on the seed; heads, orders and dropout
do. Central training uses the learning rate of RATES that validates best with seed 0.

Run: python -m benchmarks.central [--seeds 3] [--way in_step|in_total] [--technique same|lora]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bare import bare_loop
from benchmarks.report import save
from fedtune.recipe.yaml_file import read_recipe
from fedtune.simulation import resolve_recipe
from fedtune.tasks import get_task
from fedtune.training import EvaluatedModel, RunContext, evaluate_model, get_run_context

RECIPE = Path(__file__).parents[1] / "recipes" / "sentiment.yaml"
TECHNIQUES = {"same": [], "lora": ["train.techniques=lora"]}
"""What the bare loop trains, as overrides of the recipe."""
RATES = {"same": (3e-3, 6e-3), "lora": (1e-3, 3e-3)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--way", choices=["in_step", "in_total"], default="in_step")
    parser.add_argument("--technique", choices=list(TECHNIQUES), default="same")
    arguments = parser.parse_args()
    kind, way = arguments.technique, arguments.way
    trials = {rate: train_centrally(0, kind, rate, way) for rate in RATES[kind]}
    best = max(trials, key=lambda rate: trials[rate]["validation"])
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        rows.append(compare(seed, kind, best, way))
        gap = 100 * statistics.mean(row["central"]["test"] - row["federated"] for row in rows)
        save(f"central-{way}-{kind}", {"rows": rows, "rates_tried": trials, "mean_gap_points": gap})


def compare(seed: int, kind: str, rate: float, way: str) -> dict[str, Any]:
    """Mean test accuracy over domains, federated and central, for one seed."""
    started = time.perf_counter()
    federated = simulate(seed)
    seconds = time.perf_counter() - started
    central = train_centrally(seed, kind, rate, way)
    row = {"seed": seed, "federated": federated, "federated_seconds": seconds, "central": central}
    print(row, file=sys.stderr, flush=True)
    return row


def simulate(seed: int) -> float:
    command = [sys.executable, "-m", "fedtune.cli.main", "simulate", str(RECIPE), "--json", "--set", f"seed={seed}"]
    run = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    figures = [m for m in run["metrics"] if (m["split"], m["domain"], m["name"]) == ("test", "mean", "accuracy")]
    return float(figures[-1]["value"])


@lru_cache
def train_centrally(seed: int, kind: str, rate: float, way: str) -> dict[str, float]:
    recipe = read_recipe(RECIPE, [f"seed={seed}", f"train.lr={rate}", *TECHNIQUES[kind]])
    steps, batch = recipe.federation.rounds * (recipe.train.local_steps or 0), recipe.train.batch_size
    if way == "in_step":
        batch *= recipe.cohort_size
    else:
        steps *= recipe.cohort_size
    train = recipe.train.model_copy(update={"batch_size": batch})
    shop = get_run_context(resolve_recipe(recipe.model_copy(update={"train": train})).model_dump_json())
    bare_loop(shop, np.arange(len(shop.train)), steps, seed)
    figures = {part: mean_accuracy(shop, part) for part in ("validation", "test")}
    return {"rate": rate, "steps": steps, "batch": batch, **figures}


def mean_accuracy(shop: RunContext, part: str) -> float:
    scores = evaluate_model(
        EvaluatedModel(shop.model, get_task(shop.recipe.task), shop.recipe.evaluation.batch_size), getattr(shop, part)
    )
    return next(found.value for found in scores if (found.domain, found.name) == ("mean", "accuracy"))


if __name__ == "__main__":
    main()
