"""Claim: SmolLM2 learns by LoRA of rank 8 from messages of at most 50 kB, within 0.5 % of the loss of fp32 messages.

SmolLM2 (135 M parameters), LoRA of rank 8 on the query and value projections, clients train B (``trained_factors:
b-only``), sentences of film reviews, three clients, all in every round. Per arm and seed: the largest message up, and
the mean loss per token on validation sentences before training and after the last round. One learning rate for all
arms, chosen for none. Every arm starts from the same state and draws the same batches. Few rounds and few sentences:
the loss falls, but training is far from its end.

Run: python -m benchmarks.small_messages [--arms ...] [--seeds 0 1 2] [--rounds 5]
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

import torch

import fedtune
from benchmarks.report import save
from fedtune.paths import get_cache_folder

MOST_BYTES, MOST_MORE_LOSS = 50_000, 0.005
RECIPE: dict[str, Any] = {
    "version": 2,
    "name": "small-messages",
    "task": "text-generation",
    "model": {"source": "sample:smollm2"},
    "data": {
        "source": "sample:films",
        "splits": {"validation": 0.006, "test": 0.0005},
        "partition": {"kind": "iid"},
    },
    "devices": [{"name": "tablet", "count": 3}],
    "train": {
        "techniques": [
            {"lora": {"rank": 8, "alpha": 16, "target_modules": ["q_proj", "v_proj"], "trained_factors": "b-only"}}
        ],
        "optimiser": "adamw",
        "lr": 0.003,
        "lr_schedule": "constant",
        "batch_size": 4,
        "max_length": 32,
        "local_steps": 3,
    },
}
FEEDBACK = {"error_feedback": "ef21"}
ARMS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "sign, ef21": {"up": ["sign"], **FEEDBACK},
    "top-k 0.2, int4, zstd, ef21": {"up": [{"top-k": {"share": 0.2}}, "int4", "zstd"], **FEEDBACK},
    "top-k 0.2, int4, zstd": {"up": [{"top-k": {"share": 0.2}}, "int4", "zstd"]},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {"FEDTUNE_CACHE": str(get_cache_folder()), "FEDTUNE_HOME": home}
        for seed, arm in itertools.product(arguments.seeds, arguments.arms):
            rows.append(measure_loss(seed, arm, arguments.rounds))
            print(rows[-1], file=sys.stderr, flush=True)
            summary = {
                arm: compare_with_fp32(rows, arm) for arm in arguments.arms if arm in {one["arm"] for one in rows}
            }
            save("small_messages", {"rounds": arguments.rounds, "rows": rows, "arms": summary})


def measure_loss(seed: int, arm: str, rounds: int) -> dict[str, Any]:
    """The bytes and the validation loss of one run, and its processor seconds."""
    evaluation = {"every_n_rounds": rounds, "batch_size": 16}
    recipe = {**RECIPE, "seed": seed, "federation": {"rounds": rounds}, "evaluation": evaluation}
    started = time.process_time()
    run = fedtune.simulate(recipe | ({"wire": ARMS[arm]} if ARMS[arm] else {}), workers=1)
    sent = [client.bytes_up for one in run.rounds for client in one.client_records]
    return {
        "seed": seed,
        "arm": arm,
        "bytes_up": max(sent),
        "loss_before": find_loss(run, 0),
        "loss": find_loss(run, rounds),
        "seconds": round(time.process_time() - started, 1),
    }


def find_loss(run: Any, number: int) -> float:
    """The validation loss after a round."""
    [found] = [
        one.value
        for one in run.rounds[number].metrics
        if (one.split, one.domain, one.name) == ("validation", "all", "loss")
    ]
    return float(found)


def compare_with_fp32(rows: Sequence[dict[str, Any]], arm: str) -> dict[str, Any]:
    """An arm over its seeds: its bytes, its mean loss, and by which share this is above that of fp32 messages."""
    own = {row["seed"]: row for row in rows if row["arm"] == arm}
    plain = {row["seed"]: row["loss"] for row in rows if row["arm"] == "fp32" and row["seed"] in own}
    more = [own[seed]["loss"] / loss - 1 for seed, loss in plain.items()]
    found = {
        "bytes_up": max(row["bytes_up"] for row in own.values()),
        "loss_before": round(statistics.fmean(row["loss_before"] for row in own.values()), 4),
        "loss": round(statistics.fmean(row["loss"] for row in own.values()), 4),
    }
    if not more or arm == "fp32":
        return found
    fits = found["bytes_up"] <= MOST_BYTES and statistics.fmean(more) <= MOST_MORE_LOSS
    return {**found, "more_loss": round(statistics.fmean(more), 5), "worst_seed": round(max(more), 5), "holds": fits}


if __name__ == "__main__":
    main()
