"""What each technique keeps, and what it costs: the table a user chooses from.

One step per case in a fresh process on one thread: bytes kept for the backward pass (unique storages, parameters
excluded), their peak over the step, peak resident memory, and the median seconds of three further steps.

Run: python -m benchmarks.techniques
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.report import save
from fedtune.contribution import pack
from fedtune.memory import StorageMeter, peak_rss, reset_peak_rss
from fedtune.recipe import read
from fedtune.simulation import resolve
from fedtune.techniques import begin_round, trained
from fedtune.training import processor_threads, read_state, train_mode, workshop

RECIPES = Path(__file__).parents[1] / "recipes"
CASES = {
    "sentiment": ["full", "full+checkpointing", "lora", "lora+checkpointing", "qlora", "bias", "classifier"],
    "films": ["full", "lora", "lora+checkpointing", "qlora", "qlora+checkpointing"],
    "digits": ["full", "lora", "bias", "classifier"],
}
FILES = {"sentiment": "sentiment.yaml", "films": "lm.yaml", "digits": "digits.yaml"}


def main() -> None:
    rows = [in_fresh_process(name, techniques) for name, cases in CASES.items() for techniques in cases]
    save("techniques", {"rows": rows})


def in_fresh_process(name: str, techniques: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.techniques", name, techniques]
    row: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(row, file=sys.stderr, flush=True)
    return row


def measured(name: str, techniques: str) -> dict[str, Any]:
    recipe = resolve(read(RECIPES / FILES[name], [f"train.techniques={techniques}"]))
    shop = workshop(recipe.model_dump_json())
    begin_round(shop.techniques, shop.model, 1)
    train_mode(shop.model)
    batch = shop.train.batch(range(recipe.train.batch))
    reset_peak_rss()
    loaded = peak_rss()
    with processor_threads(1):
        with StorageMeter(excluded=[*shop.model.parameters(), *shop.model.buffers()]) as meter:
            loss = shop.model(**batch).loss
            kept = meter.bytes
            loss.backward()
        seconds = [step(shop.model, batch) for _ in range(3)]
    names = trained(shop.model)
    return {
        "recipe": name,
        "techniques": techniques,
        "kept_bytes": kept,
        "peak_bytes": meter.peak,
        "rss_over_loaded_bytes": peak_rss() - loaded,
        "rss_bytes": peak_rss(),
        "seconds": statistics.median(seconds),
        "trainable": sum(tensor.numel() for tensor in read_state(shop.model, names).values()),
        "bytes_up": len(pack(read_state(shop.model, names))),
        "bytes_down": len(pack(read_state(shop.model, shop.shared))),
    }


def step(model: Any, batch: Any) -> float:
    started = time.perf_counter()
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()
    return time.perf_counter() - started


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measured(*sys.argv[1:])))
    else:
        main()
