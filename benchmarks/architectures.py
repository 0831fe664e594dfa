"""Claim: on 53 architectures every technique is exact or refused in one sentence.

Each cell builds the model from a folder as a run does, applies the technique, and takes two rounds of two steps. Then
``gradient`` is the largest relative difference to the same network's gradients with stored activations; ``unmoved``
counts the tensors that the rounds left as they were; ``full`` and ``adapter`` are the largest differences of logits
between the trained model and its export in plain transformers or peft, relative to the largest logit.

A cell is ``exact`` where all of them hold, ``refused`` where fedtune says in one sentence why not, ``wrong`` where a
figure does not hold, and ``broken`` where anything else was raised.

Run: python -m benchmarks.architectures [--only bert,llama] [--techniques lora,meft]
"""

import argparse
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.architecture_bench import Bench, recipe_for
from benchmarks.architecture_export import exported, logits
from benchmarks.architecture_settings import ARCHITECTURES
from benchmarks.report import save
from fedtune.errors import FedtuneError
from fedtune.profiling.gradient_check import gradient_error
from fedtune.simulation import resolve_recipe
from fedtune.training import ClientRound, get_model_state, prepare_model, set_model_state, train_local_model

__all__ = ["TECHNIQUES", "Cell", "cell"]

TECHNIQUES = {
    "full": "full",
    "classifier": "head-only",
    "bias": "bias",
    "lora": "lora",
    "qlora": "qlora",
    "checkpointing": "gradient-checkpointing+full",
    "recompute": "selective-checkpointing+full",
    "fused-head": "fused-cross-entropy+full",
    "meft": "meft",
    "deft": "deft+full",
    "norm": "batch-norm",
    "last-blocks": "last-blocks",
    "mobiletl": "{mobiletl: {hard_swish: exact}}",
    "tinytl": "tinytl",
    "live-norm": "batch-norm-statistics+full",
    "act-pruning": "activation-pruning+full",
    "dyn-pruning": "{dynamic-pruning: {density: 0.9, every: 1}}",
}
"""What each column is called, and what its recipe says."""
_ROUNDED: dict[str, float | None] = {"fused-head": 1e-4, "act-pruning": None, "mobiletl": 1e-4}
"""Gradients that are those of the twin up to rounding, or on purpose others."""
_LOGITS = 2e-5


@dataclass(frozen=True)
class Cell:
    """One architecture under one technique; null where a figure does not apply."""

    architecture: str
    technique: str
    verdict: str = "exact"
    why: str = ""
    gradient: float | None = None
    trained: int = 0
    unmoved: int = 0
    full: float | None = None
    adapter: float | None = None


def cell(bench: Bench, technique: str, folder: Path) -> Cell:
    """Put a technique to the test; ``folder`` is for what is exported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = _tried(bench, technique, folder)
    except FedtuneError as error:
        refused = "\n" not in str(error) and len(str(error)) < 400
        return Cell(bench.name, technique, "refused" if refused else "wrong", str(error))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        why = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        return Cell(bench.name, technique, "broken", why)
    return _judged(found)


def _settings(technique: str) -> str:
    said = TECHNIQUES[technique]
    return f"[{said}]" if said.startswith("{") else said


def _tried(bench: Bench, technique: str, folder: Path) -> Cell:
    recipe = resolve_recipe(recipe_for(bench.task, bench.folder, f"train.techniques={_settings(technique)}"))
    model, chosen, shared = prepare_model(recipe, bench.labels)
    before = state = get_model_state(model, shared)
    indices = np.arange(len(bench.examples))
    trained: set[str] = set()
    for number in (1, 2):
        outcome = train_local_model(ClientRound(model, chosen, recipe, bench.examples, indices, number, 0), state)
        state = {**state, **{name: state[name] + delta for name, delta in outcome.delta.items()}}
        trained |= outcome.delta.keys()
    unmoved = [name for name in trained if torch.equal(state[name], before[name])]
    set_model_state(model, state)
    batch = bench.examples.make_batch(range(4))
    wanted = logits(model, batch)
    gradient = gradient_error(recipe, bench.labels, state, batch, (1, 2))
    full, adapter = (exported(bench, recipe, state, form, folder, batch, wanted) for form in ("model", None))
    return Cell(
        bench.name, technique, "exact", ", ".join(sorted(unmoved)), gradient, len(trained), len(unmoved), full, adapter
    )


def _judged(found: Cell) -> Cell:
    faults = []
    allowed = _ROUNDED.get(found.technique, 0.0)
    if allowed is not None and (found.gradient or 0.0) > allowed:
        faults.append(f"gradients differ by {found.gradient:.2g}")
    if found.unmoved == found.trained:
        faults.append("nothing moved")
    faults += [
        f"the {form} export differs by {error:.2g}"
        for form, error in (("model", found.full), ("adapter", found.adapter))
        if error is not None and error > _LOGITS
    ]
    return found if not faults else Cell(**{**asdict(found), "verdict": "wrong", "why": "; ".join(faults)})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(ARCHITECTURES))
    parser.add_argument("--techniques", type=lambda text: text.split(","), default=list(TECHNIQUES))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in chosen.only:
            bench = Bench.of(name, folder / name)
            row = [cell(bench, technique, folder / "exported") for technique in chosen.techniques]
            cells += row
            for one in row:
                if one.verdict != "exact":
                    print(name, one.technique, one.verdict, one.why, file=sys.stderr, flush=True)
    _show(cells, chosen.techniques)
    save(
        "architectures",
        {"counts": dict(Counter(one.verdict for one in cells)), "cells": [asdict(one) for one in cells]},
    )


def _show(cells: Sequence[Cell], techniques: Sequence[str]) -> None:
    table = Table("architecture", *techniques)
    for name in dict.fromkeys(one.architecture for one in cells):
        table.add_row(name, *[one.verdict for one in cells if one.architecture == name])
    Console(width=250).print(table)


if __name__ == "__main__":
    main()
