"""Does the plan know what a step takes? Predicted against measured bytes for every technique, and whole processes.

Each row is a technique on one model and one shape: bytes kept for the backward pass and their peak as `fedtune plan`
predicts them from tensors without data, and as the storage meter of `fedtune profile` counts them in a real step; and
the predicted peak memory of the process against that of a fresh process. Both import transformers, as a profile does;
`benchmarks.plan_devices` has the trainers of devices, which build plain blocks. What cannot run stays in, with the
reason. Rows are saved one by one, and those that are there already are not measured again: --again forgets them.

Run: python -m benchmarks.plan [--models minilm ...] [--shapes N] [--again]. Seconds do not count.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.report import save
from fedtune.cli.profile import read_profiled_recipe
from fedtune.plan.plan_report import trace_settings
from fedtune.plan.prediction import Runtime, predict_memory
from fedtune.plan.runtimes import measure_runtimes
from fedtune.plan.settings_trace import SettingsTrace
from fedtune.profiling import (
    ProfileCase,
    StepProfile,
    format_techniques,
    list_profiled_techniques,
    profile_in_subprocess,
)
from fedtune.recipe.schema import Recipe, Unit

MODELS: dict[str, tuple[str, str, list[tuple[int, int]]]] = {
    "minilm": ("text-classification", "max_length", [(4, 64), (16, 128), (8, 256), (32, 64)]),
    "smollm2": ("text-generation", "max_length", [(1, 64), (2, 128), (1, 256), (4, 128)]),
    "efficientnet-lite0": ("image-classification", "image_size", [(4, 96), (8, 96), (4, 160), (8, 224)]),
}
MODULES = ("fedtune.profiling",)
Row = dict[str, Any]


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--shapes", type=int, default=4)
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    rows = [] if options.again else read_rows()
    for number in range(options.shapes):
        for model in options.models:
            for row in measure_shape(model, number, rows):
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
                save("plan", {**summarise(rows), "rows": rows})


def read_rows() -> list[Row]:
    path = Path(__file__).parent / "results" / "plan.json"
    found: list[Row] = json.loads(path.read_text())["rows"] if path.is_file() else []
    return found


def measure_shape(model: str, number: int, known: list[Row]) -> Iterator[Row]:
    task, side, shapes = MODELS[model]
    batch, size = shapes[number]
    shape = f"{batch} x {size}"
    recipe = read_profiled_recipe(
        None, f"sample:{model}", task, (f"train.batch_size={batch}", f"train.{side}={size}", "train.threads=1")
    )
    done = {row["technique"] for row in known if (row["model"], row["shape"]) == (model, shape)}
    lists = [units for units in list_lists() if format_techniques(units) not in done]
    traces = trace_settings(recipe, lists, plain_blocks=False) if lists else []
    runtimes = measure_runtimes({trace.runtime for trace in traces if trace.error is None}, MODULES)
    for units, trace in zip(lists, traces, strict=True):
        yield {"model": model, "shape": shape, **measure(recipe, units, trace, runtimes)}


def list_lists() -> list[list[Unit]]:
    """Each technique alone or beside one that trains, then pairs that plans recommend."""
    pairs = ("lora+gradient-checkpointing+fused-cross-entropy", "meft+fused-cross-entropy")
    return [*list_profiled_techniques(), *([Unit(name=name) for name in joined.split("+")] for joined in pairs)]


def measure(recipe: Recipe, units: list[Unit], trace: SettingsTrace, runtimes: dict[str, Runtime]) -> Row:
    labels = ("no", "yes") if recipe.task.name.endswith("classification") else ()
    train = recipe.train.model_copy(update={"techniques": units})
    text = recipe.model_copy(update={"train": train}).model_dump_json()
    name = format_techniques(units)
    row: Row = {"technique": name, "predicted_error": trace.error}
    found = profile_in_subprocess(ProfileCase(name, text, labels, None))
    if not isinstance(found, StepProfile):
        return row | {"error": found.error}
    if trace.error is not None:
        return row
    batch = trace.batches[-1]
    memory = predict_memory(trace, batch, runtimes[trace.runtime], train.optimiser, train.momentum)
    return row | {
        "kept": compare(batch.kept_bytes, found.kept_bytes),
        "peak": compare(batch.peak_bytes, found.peak_bytes),
        "total": compare(memory.total_bytes, found.rss_bytes),
        "up": compare(trace.up_bytes, found.wire_bytes),
        "down": compare(trace.down_bytes, found.down_bytes),
    }


def compare(predicted: int, measured: int) -> dict[str, float]:
    return {
        "predicted": predicted,
        "measured": measured,
        "off_percent": round(100 * (predicted - measured) / max(1, measured), 3),
    }


def summarise(rows: list[Row]) -> Row:
    """Count the rows, the exact ones, and give the extremes in percent."""
    told: Row = {"planned": sum("kept" in row for row in rows)}
    told["refused by both"] = sum("error" in row and row["predicted_error"] is not None for row in rows)
    told["refused by one"] = [
        f"{row['model']} {row['shape']} {row['technique']}"
        for row in rows
        if ("error" in row) != (row["predicted_error"] is not None)
    ]
    for kind in ("kept", "peak", "total", "up", "down"):
        off = [row[kind]["off_percent"] for row in rows if kind in row]
        exact = sum(row[kind]["predicted"] == row[kind]["measured"] for row in rows if kind in row)
        told[kind] = {"exact": exact, "lowest_percent": min(off, default=0), "highest_percent": max(off, default=0)}
    return told


if __name__ == "__main__":
    main()
