"""Claim: what privacy costs in accuracy on recipes/private.yaml, and at which epsilon.

Arms differ in ``privacy`` alone: none; contributions clipped with no noise to speak of; the server's noise at a
multiplier of 2 (the recipe's own) and 4; noise of the clients' own at multiplier 2. Per arm and seed: test accuracy of
the last round and epsilon at the recipe's delta. The seed decides data, sampling and order; the noise is new in every
run, as it must be, so that its rows do not repeat to the bit.

Run: python -m benchmarks.privacy [--seeds 0 1 2] [--arms 'none;clipped']
Rows of seeds and arms run before are kept, so that they can be run one at a time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import save
from fedtune.paths import get_cache_folder

RECIPE = Path(__file__).parents[1] / "recipes" / "private.yaml"
RESULT = Path(__file__).parent / "results" / "privacy.json"
ARMS: dict[str, tuple[str, ...]] = {
    "none": ("privacy=null",),
    "clipped": ("privacy.noise_multiplier=1e-6",),
    "server, noise 2": ("privacy.noise_multiplier=2.0",),
    "server, noise 4": ("privacy.noise_multiplier=4.0",),
    "client, noise 2": ("privacy.noise_multiplier=2.0", "privacy.noise_added_by=client"),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", default=";".join(ARMS), help="separated by semicolons")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else []
    for seed in arguments.seeds:
        for arm in arguments.arms.split(";"):
            row = {"arm": arm, "seed": seed, **figures(f"seed={seed}", *ARMS[arm])}
            rows = [other for other in rows if (other["arm"], other["seed"]) != (arm, seed)] + [row]
            means = [mean(rows, one) for one in ARMS if any(row["arm"] == one for row in rows)]
            save("privacy", {"recipe": RECIPE.name, "rows": rows, "means": means})


def figures(*settings: str) -> dict[str, float | None]:
    """Test accuracy and epsilon of one run in a home of its own; epsilon is None without noise."""
    overrides = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "fedtune.cli.main", "simulate", str(RECIPE), "--json", *overrides]
    with tempfile.TemporaryDirectory() as home:
        own = {**os.environ, "FEDTUNE_CACHE": str(get_cache_folder()), "FEDTUNE_HOME": home}
        printed = subprocess.run(command, check=True, env=own, stdout=subprocess.PIPE).stdout
    metrics = json.loads(printed)["metrics"]
    noise = next((float(one.partition("=")[2]) for one in settings if one.startswith("privacy.noise_multiplier=")), 0.0)
    epsilon = last(metrics, "privacy", "epsilon") if noise > 1e-3 else None
    return {"accuracy": last(metrics, "test", "accuracy"), "epsilon": epsilon}


def last(metrics: list[dict[str, Any]], part: str, name: str) -> float:
    wanted = [one for one in metrics if (one["split"], one["domain"], one["name"]) == (part, "all", name)]
    return float(wanted[-1]["value"])


def mean(rows: list[dict[str, Any]], arm: str) -> dict[str, Any]:
    own = [row for row in rows if row["arm"] == arm]
    accuracies = [row["accuracy"] for row in own]
    return {"arm": arm, "accuracy": statistics.mean(accuracies), "of": accuracies, "epsilon": own[0]["epsilon"]}


if __name__ == "__main__":
    main()
