"""Claim: the in-process engine is at least 8x faster than Flower's own engine for a small federation, bit for bit.

Two tasks, each the whole command from start to exit, imports and engine start-up included; the trivial one is run three
times on each engine, in turns, and medians count:
trivial   4 clients, 3 rounds, logistic regression on 8x8 digits;
flute     FLUTE's published shape: logistic regression on MNIST, 1000 clients, 10 per round, 100 rounds, batch 10,
          learning rate 0.03, one local epoch, validation every 20 rounds; here on 5,000 digits in place of 60,000.

Run: python -m benchmarks.engines [trivial] [flute]
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import save

TASKS = {
    "trivial": """
version: 2
name: trivial
task: image-classification
model: {source: "sample:logistic"}
data: {source: "sample:digits"}
devices: [{count: 4}]
train: {techniques: [full], optimiser: sgd, lr: 0.03, max_grad_norm: 1.0, lr_schedule: constant,
  batch_size: 10, image_size: 28, local_epochs: 1}
federation: {rounds: 3}
""",
    "flute": """
version: 2
name: flute
task: image-classification
model: {source: "sample:logistic"}
data: {source: "sample:mnist-5k", splits: {validation: 0.1, test: 0.1}}
devices: [{count: 1000}]
train: {techniques: [full], optimiser: sgd, lr: 0.03, max_grad_norm: 1.0, lr_schedule: constant,
  batch_size: 10, image_size: 28, local_epochs: 1}
federation: {rounds: 100, clients_per_round: 10}
evaluation: {every_n_rounds: 20}
""",
}


def main() -> None:
    for name in sys.argv[1:] or list(TASKS):
        repeats = 3 if name == "trivial" else 1
        ended = [(finish(TASKS[name], "in-process"), finish(TASKS[name], "flower")) for _ in range(repeats)]
        seconds = [statistics.median(one["seconds"] for one in engine) for engine in zip(*ended, strict=True)]
        result = {
            "recipe": TASKS[name],
            "runs": [{"local": ours, "flower": flowers} for ours, flowers in ended],
            "ratio": seconds[1] / seconds[0],
            "same_weights": len({one["sha256"] for pair in ended for one in pair}) == 1,
        }
        save(f"engines-{name}", result)


def finish(recipe: str, engine: str) -> dict[str, Any]:
    """Seconds of the whole command, and what it ended with."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(recipe, encoding="utf-8")
        environment = {**os.environ, "FEDTUNE_HOME": folder, "FEDTUNE_CACHE": str(cache())}
        command = [sys.executable, "-m", "fedtune.cli.main", "simulate", str(path), "--engine", engine, "--json"]
        started = time.perf_counter()
        printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout
        seconds = time.perf_counter() - started
    run = json.loads(printed)
    test = [m["value"] for m in run["metrics"] if (m["split"], m["domain"], m["name"]) == ("test", "all", "accuracy")]
    return {"seconds": seconds, "sha256": run["checkpoint"]["sha256"], "test_accuracy": test[-1]}


def cache() -> Path:
    from fedtune import paths

    return paths.get_cache_folder()


if __name__ == "__main__":
    main()
