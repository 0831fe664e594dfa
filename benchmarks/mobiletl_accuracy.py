"""Claims: MobileTL ends within 0.5 point of plain tuning of as many blocks, five blocks within 0.6 of full tuning.

EfficientNet-Lite0, pretrained on ImageNet, learns Fashion-MNIST at 96 pixels: 5000 training pictures drawn by the seed,
as many epochs for every arm, batches of 8, AdamW with a cosine, no decay: one client that is the whole federation, so
that what trains is what trains anywhere else. The learning rate of each arm is the one of its RATES that validates best
with seed 0, on 1000 held-out pictures; 2000 test pictures, the same for all, are scored once per seed. Of their
accuracy the sampling error is about 0.7 point; differences between arms are of pairs and vary less. Each training is a
process of its own on one thread.

Run: python -m benchmarks.mobiletl_accuracy [--seeds 3] [--epochs 3] [--arms "mobiletl 3;last-blocks 3"] [--short]
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.report import save
from fedtune.data import EncodedDataset
from fedtune.recipe.schema import Recipe
from fedtune.tasks import get_task
from fedtune.training import (
    ClientRound,
    EvaluatedModel,
    RunContext,
    evaluate_model,
    get_model_state,
    get_run_context,
    train_local_model,
)

ARMS: dict[str, dict[str, Any]] = {
    "classifier": {"head-only": {}},
    "norm": {"batch-norm": {}},
    "bias": {"bias": {}},
    "tinytl": {"tinytl": {}},
    "last-blocks 1": {"last-blocks": {"blocks": 1}},
    "last-blocks 3": {"last-blocks": {"blocks": 3}},
    "last-blocks 5": {"last-blocks": {"blocks": 5}},
    "mobiletl 1": {"mobiletl": {"blocks": 1}},
    "mobiletl 3": {"mobiletl": {"blocks": 3}},
    "mobiletl 5": {"mobiletl": {"blocks": 5}},
    "mobiletl 3, paper's mask, frozen head": {"mobiletl": {"blocks": 3, "mask": "paper", "head": "freeze"}},
    "full": {"full": {}},
}
RATES = (3e-4, 1e-3, 3e-3)
RATES_FULL = (1e-4, *RATES)
"""With all weights trained 3e-4 is the edge of the others' grid, and 1e-3 diverges."""
TRAIN, VALIDATION, TEST = 5000, 1000, 2000
GAPS = {
    "mobiletl 1 below last-blocks 1": ("last-blocks 1", "mobiletl 1"),
    "mobiletl 3 below last-blocks 3": ("last-blocks 3", "mobiletl 3"),
    "mobiletl 5 below last-blocks 5": ("last-blocks 5", "mobiletl 5"),
    "mobiletl 5 below full": ("full", "mobiletl 5"),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--arms", default="all", help="names joined by ';', as in ARMS")
    parser.add_argument("--short", action="store_true", help="200 training pictures, one rate, one epoch, one seed")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(trained(**json.loads(arguments.case))))
        return
    size = {"epochs": 1, "limit": 200} if arguments.short else {"epochs": arguments.epochs, "limit": TRAIN}
    rates, seeds = (RATES[1:2], 1) if arguments.short else (RATES, arguments.seeds)
    rows: list[dict[str, Any]] = []
    for arm in list(ARMS) if arguments.arms == "all" else arguments.arms.split(";"):
        tried = RATES_FULL if arm == "full" and not arguments.short else rates
        rows.append(compared(arm, tried, seeds, size))
        save(
            "mobiletl_accuracy",
            {**size, "rates": {"full": RATES_FULL, "others": rates}, "rows": rows, "gaps_in_points": gaps(rows)},
        )


def compared(arm: str, rates: Sequence[float], seeds: int, size: dict[str, int]) -> dict[str, Any]:
    """An arm at the rate that validates best: test accuracies by seed."""
    trials = {rate: in_fresh_process(arm=arm, rate=rate, seed=0, **size) for rate in rates}
    best = max(trials, key=lambda rate: trials[rate]["validation"])
    others = [in_fresh_process(arm=arm, rate=best, seed=seed, **size) for seed in range(1, seeds)]
    validation = {str(rate): found["validation"] for rate, found in trials.items()}
    return {
        "arm": arm,
        "techniques": ARMS[arm],
        "rate": best,
        "validation": validation,
        "test": [found["test"] for found in (trials[best], *others)],
        "kept_bytes": trials[best]["kept_bytes"],
        "seconds": trials[best]["seconds"],
    }


def in_fresh_process(**case: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.mobiletl_accuracy", "--case", json.dumps(case)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(case | found, file=sys.stderr, flush=True)
    return found


def trained(arm: str, rate: float, seed: int, epochs: int, limit: int) -> dict[str, Any]:
    """One training: accuracies, and what its first step kept."""
    shop = get_run_context(recipe(arm, rate, seed, epochs, limit).model_dump_json())
    start = get_model_state(shop.model, shop.shared_names)
    everything = np.arange(len(shop.train))
    outcome = train_local_model(
        ClientRound(shop.model, shop.techniques, shop.recipe, shop.train, everything, 1, 0), start
    )
    return {
        "validation": accuracy(shop, shop.validation, VALIDATION),
        "test": accuracy(shop, shop.test, TEST),
        "loss": outcome.train_loss,
        "kept_bytes": outcome.activation_bytes,
        "seconds": outcome.seconds,
    }


def recipe(arm: str, rate: float, seed: int, epochs: int, limit: int) -> Recipe:
    """All pictures on one device, one round."""
    settings = {
        "optimiser": "adamw",
        "lr": rate,
        "lr_schedule": "cosine",
        "batch_size": 8,
        "image_size": 96,
        "local_epochs": epochs,
    }
    return Recipe.model_validate(
        {
            "name": "mobiletl-accuracy",
            "task": "image-classification",
            "seed": seed,
            "model": {"source": "sample:efficientnet-lite0"},
            "data": {"source": "sample:fashion-mnist", "max_train_examples": limit},
            "devices": [{"count": 1}],
            "train": {"techniques": [ARMS[arm]], "threads": 1, **settings},
            "federation": {"rounds": 1},
        }
    )


@dataclass(frozen=True)
class Some:
    """Some examples of a part, chosen once and for all."""

    whole: EncodedDataset
    chosen: Sequence[int]
    domains: None = None
    lengths: None = None

    def __len__(self) -> int:
        return len(self.chosen)

    def make_batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """As the whole part gives them."""
        return self.whole.make_batch([self.chosen[index] for index in indices])


def accuracy(shop: RunContext, part: EncodedDataset, count: int) -> float:
    chosen = np.random.default_rng(0).permutation(len(part))[:count].tolist()
    scores = evaluate_model(
        EvaluatedModel(shop.model, get_task(shop.recipe.task), 50, shop.techniques), Some(part, chosen)
    )
    return next(found.value for found in scores if (found.domain, found.name) == ("all", "accuracy"))


def gaps(rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Points by which the second arm lies below the first, seed by seed, and their mean in the end."""
    tests = {row["arm"]: row["test"] for row in rows}
    found = {
        name: [100 * (one - other) for one, other in zip(tests[above], tests[below], strict=True)]
        for name, (above, below) in GAPS.items()
        if above in tests and below in tests
    }
    return {name: [*each, statistics.mean(each)] for name, each in found.items()}


if __name__ == "__main__":
    main()
