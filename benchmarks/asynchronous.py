"""Claim: where some devices are slow, a buffer gets further in the same time than rounds that wait or drop them.

Handwritten digits (8x8), logistic regression, eight simulated devices of which two train at a fifth of the speed;
shards of two classes each, so that the slow ones hold what few others do. Time is simulated, by the same draws for
every arm (``fedtune.server.scheduling.simulated_time``): ``wait`` takes as long as the slowest of a round; ``deadline``
ends a round after 1.5 times a fast device's time and drops who is late (``federation.deadline``); ``buffer`` commits
every four answers with weights (1 + tau)^-a, a = 0.5, and ``unweighted`` with a = 0. Every arm gets the same simulated
time. Per arm and seed: validation accuracy over that time, test accuracy at its end, and how many rounds and answers
were made. Real seconds play no part, so the figures repeat. One rate for all arms, chosen for none.

Run: python -m benchmarks.asynchronous [--seeds 0 1 2] [--seconds 10000]
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from benchmarks.report import save
from fedtune.device.client_app import app
from fedtune.recipe.schema import Recipe
from fedtune.recipe.yaml_file import parse_recipe
from fedtune.server.scheduling.simulated_schedule import make_simulated_schedule
from fedtune.server.scheduling.simulated_time import duration
from fedtune.server.server_app import run_to_completion
from fedtune.simulation import resolve_recipe
from fedtune.simulation.in_process_grid import InProcessGrid
from fedtune.simulation.workers import SequentialWorkers
from fedtune.tracking import RoundRecord, Store
from fedtune.training import get_run_context

RECIPE = """
version: 2
name: asynchronous
task: image-classification
model: {source: "sample:logistic"}
data: {source: "sample:digits", partition: {kind: shards, shards_per_client: 2}}
devices: [{name: fast, count: 6, examples_per_second: 1}, {name: slow, count: 2, examples_per_second: 0.2}]
train: {techniques: [full], optimiser: sgd, lr: 0.03, max_grad_norm: 1.0, lr_schedule: constant,
  batch_size: 10, image_size: 28, local_steps: 10}
federation: {rounds: 1}
"""
FAST = 100.0
"""Seconds a fast device takes, more or less: ten steps of ten examples at one example a second."""
DEADLINE = 1.5 * FAST
LATE = {"buffer": "{buffer: 4, staleness: 0.5}", "unweighted": "{buffer: 4, staleness: 0}"}
MARKS = 6


class Arm(NamedTuple):
    """A recipe, and when each of its rounds ends."""

    recipe: Recipe
    ends: Sequence[float]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=10_000)
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        for name in ("wait", "deadline", *LATE):
            row = {"seed": seed, "arm": name, **measured(arm(name, seed, arguments.seconds), arguments.seconds)}
            print(row, file=sys.stderr, flush=True)
            rows.append(row)
    save("asynchronous", {"seconds": arguments.seconds, "rows": rows, "claim": claim(rows)})


def arm(name: str, seed: int, seconds: float) -> Arm:
    """As many rounds as end within ``seconds``."""
    if name in LATE:
        most = recipe(seed, int(seconds / FAST * 4), f"federation.asynchronous={LATE[name]}")
        assert most.federation.asynchronous is not None
        sizes = [len(rows) for rows in get_run_context(most.model_dump_json()).client_rows]
        ends = [
            one.end_seconds
            for one in make_simulated_schedule(most, range(most.num_clients), sizes, most.federation.asynchronous)
        ]
    else:
        most = recipe(seed, int(seconds / FAST * 2))
        ends = list(accumulate(length(most, number, name) for number in range(1, most.federation.rounds + 1)))
    done = sum(end <= seconds for end in ends)
    assert 0 < done < len(ends)
    own = {name: f"federation.asynchronous={late}" for name, late in LATE.items()} | {
        "deadline": f"federation.deadline={DEADLINE}"
    }
    return Arm(recipe(seed, done, *([own[name]] if name in own else [])), ends[:done])


def recipe(seed: int, rounds: int, *overrides: str) -> Recipe:
    return resolve_recipe(
        parse_recipe(RECIPE, "asynchronous", (f"seed={seed}", f"federation.rounds={rounds}", *overrides))
    )


def length(made: Recipe, number: int, name: str) -> float:
    """Simulated seconds of a round that waits for all, or for those before the deadline."""
    slowest = max(duration(made, 0, client, number) for client in range(made.num_clients))
    return slowest if name == "wait" else min(slowest, DEADLINE)


def measured(made: Arm, seconds: float) -> dict[str, Any]:
    """Run it and read its scores: at equal steps of simulated time the last one that was there."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEDTUNE_HOME"] = folder
        with Store.open() as store, open(os.devnull, "w") as nowhere:
            sys.stdout, shown = nowhere, sys.stdout
            try:
                rounds = run(store, made)
            finally:
                sys.stdout = shown
    accuracies, ends = [metric(record, "validation") for record in rounds], [0.0, *made.ends]
    marks = [seconds * mark / MARKS for mark in range(1, MARKS + 1)]
    found = [sum(end <= mark for end in ends) - 1 for mark in marks]
    taus = [one.staleness or 0 for record in rounds for one in record.client_records if one.status == "merged"]
    return {
        "rounds": len(rounds) - 1,
        "answers": len(taus),
        "largest_staleness": max(taus),
        "at": marks,
        "validation": [accuracies[place] for place in found],
        "test": metric(rounds[-1], "test"),
    }


def run(store: Store, made: Arm) -> list[RoundRecord]:
    whole = made.recipe
    store.create_run(
        id="run",
        name=whole.name,
        recipe=whole.model_dump_json(),
        seed=whole.seed,
        engine="in-process",
        rounds_planned=whole.federation.rounds,
    )
    run_to_completion(InProcessGrid(whole.num_clients, SequentialWorkers(app)), store, "run")
    return store.rounds("run")


def metric(record: RoundRecord, part: str) -> float:
    return next(m.value for m in record.metrics if (m.split, m.domain, m.name) == (part, "all", "accuracy"))


def claim(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row)
    return {
        name: {
            "validation": [
                statistics.mean(scores) for scores in zip(*(row["validation"] for row in found), strict=True)
            ],
            "test": statistics.mean(row["test"] for row in found),
            "rounds": statistics.mean(row["rounds"] for row in found),
        }
        for name, found in arms.items()
    }


if __name__ == "__main__":
    main()
