"""Claim: the demo federation ends within 2 points of training in one place with as many gradient steps.

For each seed: `fedtune simulate recipes/sentiment.yaml`, then the same model, techniques, learning rate and batch
trained on all training examples together for clients x rounds x steps steps. The mean test accuracy over the four
domains is compared. Splits do not depend on the seed; the heads, the orders and dropout do.

Run: python -m benchmarks.central [--set train.lr=1e-3 ...] [--part validation]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.bare import bare_loop
from benchmarks.report import save
from fedtune.recipe import Recipe, read
from fedtune.simulation import resolve
from fedtune.training import Workshop, score, workshop

RECIPE = Path(__file__).parents[1] / "recipes" / "sentiment.yaml"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--part", choices=["validation", "test"], default="test")
    parser.add_argument("--save", default="central")
    arguments = parser.parse_args()
    rows = [compare(arguments.overrides, seed, arguments.part) for seed in range(arguments.seeds)]
    gap = statistics.mean(row["central"] - row["federated"] for row in rows)
    save(arguments.save, {"part": arguments.part, "overrides": arguments.overrides, "rows": rows, "mean_gap": gap})


def compare(overrides: Sequence[str], seed: int, part: str) -> dict[str, float]:
    """Mean accuracy over domains, federated and central, for one seed."""
    recipe = resolve(read(RECIPE, [*overrides, f"seed={seed}"]))
    started = time.perf_counter()
    federated = simulate([*overrides, f"seed={seed}"], part)
    simulated = time.perf_counter()
    central, steps = train_centrally(recipe, part)
    print(f"seed {seed}: federated {federated:.4f}, central {central:.4f}", file=sys.stderr, flush=True)
    return {
        "seed": seed,
        "federated": federated,
        "central": central,
        "steps": steps,
        "federated_seconds": simulated - started,
        "central_seconds": time.perf_counter() - simulated,
    }


def simulate(overrides: Sequence[str], part: str) -> float:
    command = [sys.executable, "-m", "fedtune.cli.main", "simulate", str(RECIPE), "--json"]
    command += [word for item in overrides for word in ("--set", item)]
    run = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    figures = [m for m in run["metrics"] if (m["part"], m["domain"], m["name"]) == (part, "mean", "accuracy")]
    return float(figures[-1]["value"])


def train_centrally(recipe: Recipe, part: str) -> tuple[float, int]:
    shop: Workshop = workshop(recipe.model_dump_json())
    steps = recipe.clients_per_round * recipe.federation.rounds * (recipe.train.steps or 0)
    bare_loop(shop, range(len(shop.train)), steps, recipe.seed)
    scores = score(shop.model, getattr(shop, part), recipe.evaluation.batch, recipe.task)
    return next(value for domain, name, value in scores if (domain, name) == ("mean", "accuracy")), steps


if __name__ == "__main__":
    main()
