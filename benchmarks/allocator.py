"""What a training step takes of a process's memory with glibc's own settings and with a fixed mmap threshold.

MiniLM (22.7 M parameters), 16 texts of 128 random tokens, one thread, each case in a fresh process. ``over_loaded``
is the peak of resident memory above that of the process with the loaded model, ``anonymous_over_loaded`` that of its
anonymous part: weights that are mapped from their file are in the first when they are first read, and never in the
second. ``cpu_seconds`` is the processor time of a step, the smaller of two after one that is not counted: it does not
depend on what else runs on the machine.

Run: python -m benchmarks.allocator
"""

import gc
import json
import os
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.report import save
from fedtune import techniques
from fedtune.memory import MemoryWatch, fix_mmap_threshold, peak_rss, read_resident_memory, release_freed
from fedtune.recipe.schema import Recipe, Unit
from fedtune.recipe.yaml_file import parse_recipe
from fedtune.tasks import get_task
from fedtune.techniques import StepInfo, begin_round, begin_step
from fedtune.training import apply_optimiser_step, compute_step_loss, prepare_model, set_train_mode, use_cpu_threads
from fedtune.training.master_weights import make_stepper, masters_of
from fedtune.training.start import Start

CASES = ("lora+gradient-checkpointing",)
WAYS = ("default", "fixed")
GOALS = {"lora+gradient-checkpointing": "over_loaded at most 260 MB, at most 1.3 times the processor time"}
RECIPE = """
version: 2
name: minilm
task: text-classification
model: {source: "sample:minilm"}
data: {source: random}
devices: [{count: 1}]
train: {local_steps: 1, batch_size: 16, max_length: 128, threads: 1}
federation: {rounds: 1}
"""


def main() -> None:
    cases = sys.argv[1:] or CASES  # others may be named: meft lora
    save("allocator", {"goals": GOALS, "rows": [run_in_fresh_process(case, way) for case in cases for way in WAYS]})


def run_in_fresh_process(case: str, way: str) -> dict[str, Any]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-m", "benchmarks.allocator", "--measure", case, way]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=clean)
    row: dict[str, Any] = json.loads(done.stdout)
    print(row, file=sys.stderr, flush=True)
    return row


def measure(case: str, way: str) -> dict[str, Any]:
    allocator = fix_mmap_threshold() if way == "fixed" else "glibc, as it is"
    recipe = parse_recipe(RECIPE, "minilm", ())
    units = [Unit(name=name) for name in case.split("+")]
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"techniques": units})})
    model, chosen, _ = prepare_model(recipe, ("no", "yes"))
    torch.manual_seed(0)
    batch = {
        "input_ids": torch.randint(1000, 30_000, (16, 128)),
        "attention_mask": torch.ones(16, 128, dtype=torch.long),
        "labels": torch.arange(16) % 2,
    }
    gc.collect()
    release_freed()
    with MemoryWatch() as memory, use_cpu_threads(1):
        loaded, parts = peak_rss(), read_resident_memory()
        seconds = time_steps(model, chosen, batch, recipe)
    over = None if parts is None or memory.anonymous is None else memory.anonymous - parts.anonymous
    return {
        "techniques": case,
        "allocator": allocator,
        "over_loaded": peak_rss() - loaded,
        "anonymous_over_loaded": over,
        "cpu_seconds": min(seconds[1:]),
    }


def time_steps(
    model: torch.nn.Module, chosen: tuple[techniques.Technique, ...], batch: dict[str, torch.Tensor], recipe: Recipe
) -> list[float]:
    begin_round(chosen, model, 1)
    set_train_mode(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = make_stepper(recipe.train, model, masters_of(model, Start(model, ())))
    info = StepInfo(1, 0, 1, recipe.train.lr, recipe.train.lr)
    seconds = []
    for _ in range(3):
        started = time.process_time()
        begin_step(chosen, model, batch, 0.0)
        compute_step_loss(get_task(recipe.task), model, batch).backward()
        apply_optimiser_step(model, chosen, optimiser, parameters, recipe.train, info)
        seconds.append(time.process_time() - started)
    return seconds


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*sys.argv[2:4])))
    else:
        main()
