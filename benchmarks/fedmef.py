"""Claims about FedMef, on the recipe's federation (20 clients of equal size, label shares from Dirichlet 0.5).

Fashion-MNIST is used where it is installed.

Arms: dense averaging, a fixed random mask, dynamic pruning alone, with extrusion, FedDST, and all of FedMef at several
shares of pruned activations; those without ``normalise`` have batch norms whose statistics are merged. Strength and
share are no tuned values: at strength 1 and rate 0.1 a round of 13 steps leaves (1 - 0.2)^13 = 5 % of what it presses,
and below a share of 0.3 there is no drop to speak of. Per arm and seed:
accuracy    on the test part, after the last round;
drop        validation accuracy just before the mask moved minus just after, mean over the moves;
memory      bytes of a training device, fp32: active weights, their gradients and, one bit each, masks; of momentum-free
            SGD no moments; and what a step really keeps for its backward pass (metered). Weights and gradients are
            counted as a device with sparse kernels would hold them; PyTorch holds them dense here;
payload     bytes both ways, mean and largest over rounds and clients, as a share of the dense model's.

Run: python -m benchmarks.fedmef [--seeds 0 1 2] [--rounds 40] [--part test] [--share 0.3] [--arms a,b]
     [--result fedmef] [--set key=value ...]
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.report import save
from fedtune import merging, techniques
from fedtune.data.sources import read_data_source as read_data
from fedtune.errors import SourceError
from fedtune.recipe.schema import DataSettings, Recipe
from fedtune.recipe.yaml_file import read_recipe
from fedtune.server.selection import sample_cohort
from fedtune.simulation import resolve_recipe
from fedtune.tasks import get_task
from fedtune.techniques import list_trainable_tensors
from fedtune.training import (
    ClientRound,
    EvaluatedModel,
    LocalTrainingResult,
    RunContext,
    clear_run_context,
    evaluate_model,
    get_model_state,
    get_run_context,
    set_model_state,
    train_local_model,
)
from fedtune.wire.client_update import ClientUpdate, pack
from fedtune.wire.masked_weights import encode_masked_state, find_masks, restore_dense_tensors, select_active_values

RECIPE = Path(__file__).parents[1] / "recipes" / "fedmef.yaml"
State = Mapping[str, Tensor]
_PRUNED = "{{name: activation-pruning, settings: {{prune: {}, values: half, normalise: true}}}}"


def arms(until: int, share: float, strength: float) -> dict[str, str]:
    """Technique lists by arm; the mask moves every 5 rounds up to ``until``, at first ``share`` of what is active."""

    def dynamic(more: str = "", every: str = "5") -> str:
        settings = f"density: 0.1, every: {every}, until: {until}, share: {share}{more}"
        return f"{{name: dynamic-pruning, settings: {{{settings}}}}}"

    extruded = dynamic(f", extrusion: {{strength: {strength}}}")
    return {
        "dense": "full, batch-norm-statistics",
        "fixed mask": f"{dynamic(every='null')}, batch-norm-statistics",
        "dynamic": f"{dynamic(', extrusion: null')}, batch-norm-statistics",
        "dynamic + extrusion": f"{extruded}, batch-norm-statistics",
        "feddst": f"{dynamic(', by: clients, extrusion: null')}, batch-norm-statistics",
        "dynamic, normalised": f"{dynamic(', extrusion: null')}, {_PRUNED.format(0)}",
        **{f"fedmef {prune:.0%}": f"{extruded}, {_PRUNED.format(prune)}" for prune in (0.5, 0.7, 0.9)},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--part", choices=["validation", "test"], default="test")
    parser.add_argument("--until", type=int, default=30, help="the last round in which the mask may move")
    parser.add_argument("--share", type=float, default=0.3, help="of active weights that the first move would change")
    parser.add_argument("--strength", type=float, default=1.0, help="of extrusion")
    parser.add_argument("--arms")
    parser.add_argument("--result", default="fedmef", help="name of the file the rows go to")
    parser.add_argument("--set", nargs="*", default=[])
    arguments = parser.parse_args()
    found = arms(arguments.until, arguments.share, arguments.strength)
    chosen = arguments.arms.split(",") if arguments.arms else list(found)
    source = data_source()
    rows: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        for arm in chosen:
            settings = [f"seed={seed}", f"federation.rounds={arguments.rounds}", f"data.source={source}"]
            recipe = resolve_recipe(
                read_recipe(RECIPE, [*settings, *arguments.set, f"train.techniques=[{found[arm]}]"])
            )
            rows.append({"arm": arm, "seed": seed, **federation(recipe, arguments.part)})
            print(rows[-1], file=sys.stderr, flush=True)
        name = arguments.result if arguments.part == "test" else f"{arguments.result}-{arguments.part}"
        save(name, {"data": source, **vars(arguments), "rows": rows})


def data_source() -> str:
    try:
        read_data(DataSettings(source="sample:fashion-mnist"))
    except SourceError:
        return "sample:mnist-5k"
    return "sample:fashion-mnist"


def federation(recipe: Recipe, part: str) -> dict[str, Any]:
    """A whole federation in this process, without a store; every client's outcome goes by disk as the server's does."""
    clear_run_context()
    shop = get_run_context(recipe.model_dump_json())
    clear_run_context()
    state: State = get_model_state(shop.model, shop.shared_names)
    started, drops, kept = time.perf_counter(), [], 0
    traffic: dict[str, list[int]] = {"up": [], "down": []}
    for number in range(1, recipe.federation.rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            sent, outcomes = collect(shop, state, number, Path(folder), traffic)
            merged = merge(shop, state, number, sent)
            state = revise(shop, merged, number, sent)
        kept = max(kept, *(outcome.activation_bytes for outcome in outcomes))
        if moved := techniques.declare_extra_payload(shop.techniques, shop.model, number):
            drops.append(accuracy(shop, merged, "validation") - accuracy(shop, state, "validation"))
        if moved or number % recipe.evaluation.every_n_rounds == 0:
            print(number, f"{accuracy(shop, state, 'validation'):.4f}", file=sys.stderr, flush=True)
    return {
        "accuracy": accuracy(shop, state, part),
        "drop_points": 100 * statistics.mean(drops) if drops else None,
        "drops": drops,
        "seconds": time.perf_counter() - started,
        **memory(state, kept),
        **shares(state, traffic),
    }


def collect(
    shop: RunContext, state: State, number: int, folder: Path, traffic: dict[str, list[int]]
) -> tuple[list[ClientUpdate], list[LocalTrainingResult]]:
    sent, outcomes = [], []
    for client in sample_cohort(shop.recipe, number):
        outcome = train_local_model(
            ClientRound(shop.model, shop.techniques, shop.recipe, shop.train, shop.client_rows[client], number, client),
            state,
        )
        payload = pack({**select_active_values(outcome.delta, find_masks(state)), **outcome.extra_payload})
        path = folder / f"{client}.safetensors"
        path.write_bytes(payload)
        sent.append(ClientUpdate(client, outcome.num_examples, path))
        outcomes.append(outcome)
        traffic["up"].append(len(payload))
    traffic["down"].append(len(pack(encode_masked_state(state))))
    return sent, outcomes


def merge(shop: RunContext, state: State, number: int, sent: Sequence[ClientUpdate]) -> State:
    techniques.begin_round(shop.techniques, shop.model, number)
    found = find_masks(state)
    step = merging.build_pipeline(shop.recipe.merge)
    return restore_dense_tensors(
        merging.merge_client_updates(
            step, select_active_values(state, found), list_trainable_tensors(shop.model), sent
        ),
        found,
    )


def revise(shop: RunContext, merged: State, number: int, sent: Sequence[ClientUpdate]) -> State:
    extras = techniques.declare_extra_payload(shop.techniques, shop.model, number)
    weights = merging.build_pipeline(shop.recipe.merge).combine.compute_client_weights(
        [one.num_examples for one in sent]
    )
    answers = [
        techniques.ExtraPayload(weight, one.read_tensors(extras)) for weight, one in zip(weights, sent, strict=True)
    ]
    return techniques.after_aggregation(shop.techniques, merged, number, answers)


def accuracy(shop: RunContext, state: State, part: str) -> float:
    set_model_state(shop.model, state)
    recipe = shop.recipe
    found = evaluate_model(
        EvaluatedModel(shop.model, get_task(recipe.task), recipe.evaluation.batch_size, shop.techniques),
        getattr(shop, part),
    )
    return next(one.value for one in found if (one.domain, one.name) == ("all", "accuracy"))


def memory(state: State, kept: int) -> dict[str, int]:
    """Bytes of a device in training: two numbers per active weight, the masks, and what the metered step kept."""
    found = find_masks(state)
    values = select_active_values({name: t for name, t in state.items() if t.is_floating_point()}, found)
    active = sum(tensor.numel() for tensor in values.values())
    bits = sum(math.ceil(mask.numel() / 8) for mask in found.values())
    return {"active": active, "kept_bytes": kept, "memory_bytes": 8 * active + bits + kept}


def shares(state: State, traffic: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Payloads as shares of the dense model's bytes."""
    dense = sum(4 * tensor.numel() for tensor in state.values() if tensor.is_floating_point())
    return {
        f"{way}_{kind}": take(sizes) / dense
        for way, sizes in traffic.items()
        for kind, take in (("mean", statistics.mean), ("largest", max))
    }


if __name__ == "__main__":
    main()
