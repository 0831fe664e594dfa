"""Arms of a stream that differ in a few settings: the rate of each is chosen on validation, and not on test.

Runs are simulated in this process on one thread. The test part of each task is scored once per border by the run; the
choice of a rate sees the validation part after the last round alone. Each arm tries RATES with the first seed, and
goes on by factors of 3 while the best one is at an edge, to EXTREMES at most.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

import fedtune
from benchmarks.report import save
from fedtune.paths import get_cache_folder
from fedtune.recipe.yaml_file import parse_recipe

__all__ = ["RATES", "Stream", "compare_arms", "summarise"]

RATES = (1e-3, 3e-3, 9e-3)
EXTREMES = (1e-4, 0.1)


class Stream(NamedTuple):
    """A name, the recipe of a seed, and what differs from it in each arm."""

    name: str
    write_recipe: Callable[[int], str]
    arms: Mapping[str, Sequence[str]]


def compare_arms(result: str, streams: Sequence[Stream], num_seeds: int, rates: Sequence[float] = RATES) -> None:
    """Run all arms, and save the rows after each run. Rows that are there already stay, so that it may run in parts."""
    rows = read_rows(result)
    for seed, stream in product(range(num_seeds), streams):
        for arm in stream.arms:
            for rate in (
                iter_rates(rows, stream.name, arm, rates) if not seed else [choose_rate(rows, stream.name, arm)]
            ):
                if any(is_row(row, stream.name, arm, seed) and row["rate"] == rate for row in rows):
                    continue
                rows.append(run_arm(stream, arm, rate, seed))
                save(result, {"rates": list(rates), "streams": summarise(rows), "rows": rows})


def read_rows(result: str) -> list[dict[str, Any]]:
    """Return the rows of a result; delete its file to begin anew."""
    path = Path(__file__).parent / "results" / f"{result}.json"
    return list(json.loads(path.read_text(encoding="utf-8"))["rows"]) if path.exists() else []


def is_row(row: Mapping[str, Any], stream: str, arm: str, seed: int) -> bool:
    """Whether a row is of this stream, arm and seed."""
    return (row["stream"], row["arm"], row["seed"]) == (stream, arm, seed)


def iter_rates(rows: Sequence[Mapping[str, Any]], stream: str, arm: str, rates: Sequence[float]) -> Iterator[float]:
    """Yield the rates to try with the first seed; ``rows`` grows by the result of each before the next is asked for.

    An arm whose rate changes nothing, because nothing is trained, is tried once.
    """
    yield from rates[:1] if arm.endswith("frozen") else rates
    tried = sorted(rates)
    while not arm.endswith("frozen") and len(rates) > 1:
        best = choose_rate(rows, stream, arm)
        further = best * 3 if best == tried[-1] else best / 3 if best == tried[0] else None
        if further is None or not EXTREMES[0] <= further <= EXTREMES[1]:
            return
        tried = sorted([*tried, further])
        yield further


def run_arm(stream: Stream, arm: str, rate: float, seed: int) -> dict[str, Any]:
    """Run an arm once, and return its matrix and figures. Seconds are those of the processor."""
    changes = [*stream.arms[arm], f"train.lr={rate}"]
    cache, before = str(get_cache_folder()), time.process_time()
    with TemporaryDirectory() as home:
        os.environ |= {"FEDTUNE_HOME": home, "FEDTUNE_CACHE": cache}
        run = fedtune.simulate(parse_recipe(stream.write_recipe(seed), stream.name, changes), workers=1)
        row = {"stream": stream.name, "arm": arm, "rate": rate, "seed": seed, **read_figures(run)}
    row["cpu_seconds"] = round(time.process_time() - before)
    print({name: value for name, value in row.items() if name != "matrix"}, file=sys.stderr, flush=True)
    return row


def read_figures(run: fedtune.Run) -> dict[str, Any]:
    """Return the validation accuracy after the last round, the matrix with its figures, and the bytes sent up."""
    matrix = run.matrix
    assert matrix is not None
    scores = {(one.split, one.domain, one.name): one.value for one in run.rounds[-1].metrics}
    figures = {name: run.stream_figures[name] for name in ("accuracy", "learning", "forgetting")}
    sent = sum(client.bytes_up for record in run.rounds for client in record.client_records)
    rows = [list(row) for row in matrix.rows]
    return {"validation": scores["validation", "mean", "accuracy"], **figures, "bytes_sent": sent, "matrix": rows}


def choose_rate(rows: Sequence[Mapping[str, Any]], stream: str, arm: str) -> float:
    """Return the rate of an arm that validates best with the first seed."""
    tried = [row for row in rows if is_row(row, stream, arm, 0)]
    rate: float = max(tried, key=lambda row: row["validation"])["rate"]
    return rate


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return, by stream and arm, means over seeds at the chosen rate, and the share of the gap that the arm closes."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for stream, arm in dict.fromkeys((row["stream"], row["arm"]) for row in rows):
        rate = choose_rate(rows, stream, arm)
        own = [row for row in rows if (row["stream"], row["arm"], row["rate"]) == (stream, arm, rate)]
        found.setdefault(stream, {})[arm] = {"rate": rate, "seeds": len(own), **_average(own)}
    for arms in found.values():
        for summary in arms.values():
            summary["gap_closed"] = _compute_gap_closed(summary, arms)
    return found


def _average(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = ("accuracy", "learning", "forgetting", "bytes_sent", "cpu_seconds")
    means = {name: float(np.mean([row[name] for row in rows])) for name in names}
    accuracies = [row["accuracy"] for row in rows]
    return {**means, "deviation": float(np.std(accuracies, ddof=1)) if len(rows) > 1 else None}


def _compute_gap_closed(summary: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]]) -> float | None:
    if not {"naive", "joint"} <= arms.keys():
        return None
    low, high = arms["naive"]["accuracy"], arms["joint"]["accuracy"]
    return (summary["accuracy"] - low) / (high - low) if high > low else None
