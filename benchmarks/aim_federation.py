"""Claim: AIM in the four-domain federation: score after every round with and without, and the bytes it adds.

The recipe is recipes/aim.yaml: MiniLM, full fine-tuning, eight clients, two per domain. Arms differ in ``merge`` alone:
mean, AIM by the server's statistics, AIM by sums from clients, and the uniform-shrink control at AIM's mean factors.
Per arm and seed: mean accuracy over domains of the validation part after each round, of the test part after the last;
bytes of a contribution, mean over clients and rounds. ``--set train.techniques=lora`` gives the adapters' figures.
The claim on bytes is under 1 % of the update for full fine-tuning.

Run: python -m benchmarks.aim_federation [--seeds 0 1 2] [--rounds N] [--arms a,b] [--texts N] [--set key=value ...]
Rows of seeds and arms run before are kept, so that they can be run one at a time.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.aim_models import some
from benchmarks.report import save
from fedtune import merging
from fedtune.recipe.schema import Recipe
from fedtune.recipe.yaml_file import read_recipe
from fedtune.server.merge_context import make_merge_context
from fedtune.server.selection import sample_cohort
from fedtune.simulation import resolve_recipe
from fedtune.tasks import get_task
from fedtune.techniques import begin_round, list_trainable_tensors
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

RECIPE = Path(__file__).parents[1] / "recipes" / "aim.yaml"
RESULT = Path(__file__).parent / "results" / "aim_federation.json"
ARMS = {
    "mean": "[mean]",
    "aim, server": "[mean, {aim: {statistics: server, examples: 64}}]",
    "aim, clients": "[mean, {aim: {statistics: clients, examples: 64}}]",
    "shrink": "[mean, {shrink: {factor: aim, statistics: clients, examples: 64}}]",
}
State = Mapping[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--arms", default=";".join(ARMS), help="separated by semicolons")
    parser.add_argument("--texts", type=int, default=200, help="of each domain that are scored")
    parser.add_argument("--set", nargs="*", default=[])
    arguments = parser.parse_args()
    about = {"rounds": arguments.rounds, "texts": arguments.texts, "set": arguments.set}
    rows = kept(about)
    for seed in arguments.seeds:
        for arm in arguments.arms.split(";"):
            settings = [f"seed={seed}", f"federation.rounds={arguments.rounds}", f"merge={ARMS[arm]}", *arguments.set]
            row = {
                "seed": seed,
                "arm": arm,
                **federation(resolve_recipe(read_recipe(RECIPE, settings)), arguments.texts),
            }
            rows = [other for other in rows if (other["seed"], other["arm"]) != (seed, arm)] + [row]
            print(row, file=sys.stderr, flush=True)
            save("aim_federation", {**about, "rows": rows, "claim": claim(rows)})


def kept(about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows that an earlier call saved with the same settings."""
    before: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    same = all(before.get(key) == value for key, value in about.items())
    return list(before["rows"]) if same else []


def federation(recipe: Recipe, texts: int) -> dict[str, Any]:
    """A whole run in this process, without a store; contributions go by disk as the server's do."""
    clear_run_context()
    shop = get_run_context(recipe.model_dump_json())
    clear_run_context()
    state: State = get_model_state(shop.model, shop.shared_names)
    started, curve, sizes = time.perf_counter(), [accuracy(shop, state, "validation", texts)], []
    for number in range(1, recipe.federation.rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            sent = collected(shop, state, number, Path(folder))
            sizes += [one.path.stat().st_size for one in sent]
            state = merged(shop, state, number, sent)
        curve.append(accuracy(shop, state, "validation", texts))
        print(number, f"{curve[-1]:.4f}", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - started
    test = accuracy(shop, state, "test", texts)
    return {"validation": curve, "test": test, "bytes": statistics.mean(sizes), "seconds": seconds}


def collected(shop: RunContext, state: State, number: int, folder: Path) -> list[ClientUpdate]:
    sent = []
    for client in sample_cohort(shop.recipe, number):
        indices = shop.client_rows[client]
        got = train_local_model(
            ClientRound(shop.model, shop.techniques, shop.recipe, shop.train, indices, number, client), state
        )
        path = folder / f"{client}.safetensors"
        path.write_bytes(pack({**got.delta, **got.extra_payload}))
        sent.append(ClientUpdate(client, got.num_examples, path))
    return sent


def merged(shop: RunContext, state: State, number: int, sent: list[ClientUpdate]) -> State:
    begin_round(shop.techniques, shop.model, number)
    pipeline, names = merging.build_pipeline(shop.recipe.merge), list_trainable_tensors(shop.model)
    return merging.merge_client_updates(
        pipeline, state, names, sent, make_merge_context(shop, pipeline, state, number, names, sent)
    )


def accuracy(shop: RunContext, state: State, part: str, texts: int) -> float:
    """The mean over domains."""
    set_model_state(shop.model, state)
    recipe = shop.recipe
    found = evaluate_model(
        EvaluatedModel(shop.model, get_task(recipe.task), recipe.evaluation.batch_size, shop.techniques),
        some(getattr(shop, part), texts),
    )
    return next(one.value for one in found if (one.domain, one.name) == ("mean", "accuracy"))


def claim(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds each arm has: the curve, the test accuracy, and the bytes added to those of ``mean``."""
    arms = {arm: [row for row in rows if row["arm"] == arm] for arm in ARMS}
    plain = statistics.mean(row["bytes"] for row in arms["mean"]) if arms["mean"] else None
    return {
        arm: {
            "seeds": len(found),
            "validation": [
                statistics.mean(scores) for scores in zip(*(row["validation"] for row in found), strict=True)
            ],
            "test": statistics.mean(row["test"] for row in found),
            "added_share": statistics.mean(row["bytes"] for row in found) / plain - 1 if plain else None,
        }
        for arm, found in arms.items()
        if found
    }


if __name__ == "__main__":
    main()
