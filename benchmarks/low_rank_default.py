"""Which low-rank aggregation should be the default? Each at a rate of its own, on MiniLM and on SmolLM2.

Arms differ in what clients train and how it is merged: one factor a round in turn (alternate), B alone (freeze-a), both
and their means (fedit), their products cut to the rank (flexlora), and what is exact by a shared base (fedex-lora,
flora). MiniLM: four clients, each with one domain of the sentiment data, mean accuracy over domains. SmolLM2: three
clients with sentences from film reviews, loss per token. Small federations, so that all fit an hour: they rank arms,
and say nothing of what a long run ends with.

The rate is searched with seed 0 on validation, in steps of a factor of three from RATES, and further while the best one
lies at an edge. The test part is scored once per seed, with that rate. ``usual`` tells each arm's rate over that of
fedit, which trains both factors as LoRA does in one place.

Run: python -m benchmarks.low_rank_default [--parts minilm smollm2] [--arms ...] [--seeds 3]
Every trial is saved when it ends, and not repeated by a later call.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.aim_models import some
from benchmarks.report import save
from fedtune import merging, techniques
from fedtune.merging import MergeContext
from fedtune.recipe.yaml_file import read_recipe
from fedtune.server.selection import sample_cohort
from fedtune.simulation import resolve_recipe
from fedtune.tasks import get_task
from fedtune.training import (
    ClientRound,
    EvaluatedModel,
    RunContext,
    clear_run_context,
    evaluate_model,
    get_model_state,
    get_run_context,
    set_model_state,
    train_local_model,
)
from fedtune.wire.client_update import ClientUpdate, pack

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "low_rank_default.json"
ARMS = {
    "alternate": ("alternate", "mean"),
    "freeze-a": ("freeze-a", "mean"),
    "fedit": ("none", "fedit"),
    "flexlora": ("none", "flexlora"),
    "fedex-lora": ("remainder", "fedex-lora"),
    "flora": ("remainder", "flora"),
}
"""What clients train, and the merge."""
FACTOR, WIDEST = 3.0, 8
"""Between neighbouring rates; no more of them are tried than this."""
State = Mapping[str, Tensor]


class Part(NamedTuple):
    """A federation: its recipe and what is changed in it, the rates tried first, and the figure that is compared."""

    recipe: str
    settings: str
    clients: int
    rates: tuple[float, ...]
    figure: tuple[str, str]
    texts: int
    better: float
    """1 where more of the figure is better, -1 where less is."""


PARTS = {
    "minilm": Part(
        "sentiment.yaml",
        "data.max_train_examples=4000 federation.rounds=8 federation.quorum=1 train.max_length=48 train.local_steps=8",
        4,
        (1e-3, 3e-3, 9e-3),
        ("mean", "accuracy"),
        150,
        1.0,
    ),
    "smollm2": Part(
        "lm.yaml",
        "data.max_train_examples=1500 federation.rounds=4 federation.quorum=1 train.max_length=32 "
        "train.local_steps=2 train.optimiser=adamw",
        3,
        (3e-4, 1e-3, 3e-3),
        ("all", "loss"),
        32,
        -1.0,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trials = kept()
    for part in arguments.parts:
        chosen = {arm: searched(trials, part, arm) for arm in arguments.arms}
        for seed in range(arguments.seeds):
            for arm, rate in chosen.items():
                tried(trials, part, arm, rate, seed, tested=True)


def kept() -> list[dict[str, Any]]:
    """What earlier calls saved."""
    return list(json.loads(RESULT.read_text())["trials"]) if RESULT.is_file() else []


def searched(trials: list[dict[str, Any]], part: str, arm: str) -> float:
    """The rate that validates best with seed 0; the grid grows while that is one of its ends."""
    rates = list(PARTS[part].rates)
    while True:
        values = [PARTS[part].better * tried(trials, part, arm, rate, 0)["validation"] for rate in rates]
        best = rates[values.index(max(values))]
        if len(rates) >= WIDEST or best not in (rates[0], rates[-1]):
            return best
        rates = [rates[0] / FACTOR, *rates] if best == rates[0] else [*rates, rates[-1] * FACTOR]


def tried(
    trials: list[dict[str, Any]], part: str, arm: str, rate: float, seed: int, *, tested: bool = False
) -> dict[str, Any]:
    """One federation, from the trials so far or run and added to them."""
    about = {"part": part, "arm": arm, "rate": float(f"{rate:.3g}"), "seed": seed, "tested": tested}
    found = next((one for one in trials if about.items() <= one.items()), None)
    if found is None:
        found = {**about, **federation(part, arm, rate, seed, tested=tested)}
        trials.append(found)
        print(found, file=sys.stderr, flush=True)
        save("low_rank_default", {"claims": claims(trials), "trials": trials})
    return found


def federation(part: str, arm: str, rate: float, seed: int, *, tested: bool) -> dict[str, Any]:
    """A run in this process, without a store: its figure at the end, bytes of an update and processor seconds."""
    told, (exact, merge) = PARTS[part], ARMS[arm]
    changed = [f"train.techniques=[lora: {{exact: {exact}}}]", f"merge=[{merge}]", f"train.lr={rate}", f"seed={seed}"]
    started = time.process_time()
    clear_run_context()
    changed += [*told.settings.split(), f"devices=[{{name: phone, count: {told.clients}}}]"]
    shop = get_run_context(resolve_recipe(read_recipe(ROOT / "recipes" / told.recipe, changed)).model_dump_json())
    state: State = get_model_state(shop.model, shop.shared_names)
    sizes: list[int] = []
    for number in range(1, shop.recipe.federation.rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            sent = collected(shop, state, number, Path(folder))
            sizes += [one.path.stat().st_size for one in sent]
            state = merged(shop, state, number, sent)
    measure = partial(figure, shop, state, told)
    figures = {"validation": measure("validation"), "test": measure("test") if tested else None}
    return {**figures, "bytes_up": statistics.mean(sizes), "cpu_seconds": time.process_time() - started}


def collected(shop: RunContext, state: State, number: int, folder: Path) -> list[ClientUpdate]:
    """What the round's clients send."""
    sent = []
    for client in sample_cohort(shop.recipe, number):
        indices = shop.client_rows[client]
        got = train_local_model(
            ClientRound(shop.model, shop.techniques, shop.recipe, shop.train, indices, number, client), state
        )
        path = folder / f"{client}.safetensors"
        path.write_bytes(pack(got.delta))
        sent.append(ClientUpdate(client, got.num_examples, path))
    return sent


def merged(shop: RunContext, state: State, number: int, sent: list[ClientUpdate]) -> State:
    """The shared state after the round."""
    techniques.begin_round(shop.techniques, shop.model, number)
    pairs = techniques.list_low_rank_pairs(shop.techniques, shop.model)
    names = techniques.list_trainable_tensors(shop.model)
    return merging.merge_client_updates(
        merging.build_pipeline(shop.recipe.merge),
        state,
        names,
        sent,
        MergeContext(low_rank_pairs=pairs, round_number=number),
    )


def figure(shop: RunContext, state: State, told: Part, part: str) -> float:
    """Accuracy or loss of the shared state, on some texts of each domain."""
    set_model_state(shop.model, state)
    recipe = shop.recipe
    examples = some(getattr(shop, part), told.texts)
    found = evaluate_model(
        EvaluatedModel(shop.model, get_task(recipe.task), recipe.evaluation.batch_size, shop.techniques), examples
    )
    return next(one.value for one in found if (one.domain, one.name) == told.figure)


def claims(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """By part and arm: the rate, its multiple of fedit's, and the tests of the seeds that have run."""
    found: dict[str, Any] = {}
    for trial in (one for one in trials if one["tested"]):
        row = found.setdefault(trial["part"], {}).setdefault(trial["arm"], {"rate": trial["rate"], "tests": []})
        row["tests"].append(trial["test"])
        row["mean"] = statistics.mean(row["tests"])
    for rows in found.values():
        for row in rows.values():
            row["rate_over_usual"] = row["rate"] / rows["fedit"]["rate"] if "fedit" in rows else None
    return found


if __name__ == "__main__":
    main()
