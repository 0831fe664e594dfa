"""Claim: with 30 % of hostile clients, robust merges stay near the accuracy of a run without attack, the mean does not.

Handwritten digits (8x8), logistic regression, twenty clients of which six are hostile, all in every round. Per merge,
attack and seed: test accuracy after the last round. The attackers of ``none`` are honest. The attacks have their
defaults, but for the sign flip, which is three times as long, so that the mean turns back. ``krum``, ``multi-krum`` and
the trimmed mean are told six attackers. ``bulyan`` needs 27 clients for six, so it is told four, the most of twenty.
Root data of ``fltrust`` are 100 validation examples. One learning rate for all, chosen for none.

Run: python -m benchmarks.robust_merges [--seeds 0 1 2] [--rounds 12] [--attacks none sign-flip]
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import fedtune
from benchmarks.report import save

CLIENTS, HOSTILE = 20, 6
RECIPE = {
    "version": 2,
    "name": "robust",
    "task": "image-classification",
    "model": {"source": "sample:logistic"},
    "data": {"source": "sample:digits"},
    "train": {
        "techniques": ["full"],
        "optimiser": "sgd",
        "lr": 0.05,
        "lr_schedule": "constant",
        "max_grad_norm": 1.0,
        "batch_size": 10,
        "image_size": 28,
        "local_steps": 5,
    },
    "evaluation": {"every_n_rounds": 100},
}
MERGES: dict[str, dict[str, Any]] = {
    "mean": {},
    "trimmed-mean": {"trim_fraction": 0.3},
    "median": {},
    "geometric-median": {},
    "krum": {"f": HOSTILE},
    "multi-krum": {"f": HOSTILE},
    "bulyan": {"f": 4},
    "centred-clipping": {},
    "fltrust": {"root_data": "validation"},
}
ATTACKS: dict[str, dict[str, Any]] = {
    "none": {},
    "sign-flip": {"scale": 3.0},
    "label-flip": {},
    "noise": {},
    "a-little-is-enough": {},
    "model-replacement": {},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--attacks", nargs="+", choices=list(ATTACKS), default=list(ATTACKS))
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as home:
        os.environ["FEDTUNE_HOME"] = home
        for seed, merge, attack in itertools.product(arguments.seeds, MERGES, arguments.attacks):
            rows.append(measure_accuracy(seed, merge, attack, arguments.rounds))
            print(rows[-1], file=sys.stderr, flush=True)
    save(
        "robust_merges",
        {"rounds": arguments.rounds, "rows": rows, "mean_accuracy": average_over_seeds(rows, arguments.attacks)},
    )


def measure_accuracy(seed: int, merge: str, attack: str, rounds: int) -> dict[str, Any]:
    """The test accuracy of one run, and its processor seconds."""
    hostile = {"name": "bad", "count": HOSTILE, **({} if attack == "none" else {"attack": {attack: ATTACKS[attack]}})}
    devices = [{"name": "good", "count": CLIENTS - HOSTILE}, hostile]
    recipe = {**RECIPE, "seed": seed, "devices": devices, "merge": [{merge: MERGES[merge]}]}
    recipe["federation"] = {"rounds": rounds}
    started = time.process_time()
    run = fedtune.simulate(recipe, workers=1)
    [accuracy] = [
        one.value for one in run.rounds[-1].metrics if (one.split, one.domain, one.name) == ("test", "all", "accuracy")
    ]
    seconds = round(time.process_time() - started, 2)
    return {"seed": seed, "merge": merge, "attack": attack, "accuracy": accuracy, "seconds": seconds}


def average_over_seeds(rows: Sequence[dict[str, Any]], attacks: Sequence[str]) -> dict[str, dict[str, float]]:
    """By merge and attack, over the seeds."""
    return {
        merge: {
            attack: round(
                statistics.fmean(row["accuracy"] for row in rows if (row["merge"], row["attack"]) == (merge, attack)), 4
            )
            for attack in attacks
        }
        for merge in MERGES
    }


if __name__ == "__main__":
    main()
