"""Claim: the local engine takes at most 1.15x the time of a bare PyTorch loop that does the same steps.

Both train MiniLM with the demo's techniques: 8 clients, 2 rounds, the same batches, one thread, then score the same
parts. The bare loop makes one optimiser per client and round, as the clients do, and nothing else: no messages, no
checks, no merging, no checkpoints, no store. Engine and loop take turns; the median ratio counts.

Run: python -m benchmarks.overhead
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.report import save
from fedtune.recipe.yaml_file import read_recipe
from fedtune.seeds import derive_seed
from fedtune.simulation import resolve_recipe, run_in_process
from fedtune.tasks import get_task
from fedtune.techniques import begin_round, list_trainable_tensors
from fedtune.tracking import Store, make_file_url
from fedtune.training import (
    EvaluatedModel,
    RunContext,
    evaluate_model,
    get_model_state,
    get_run_context,
    set_model_state,
    set_run_context,
    use_cpu_threads,
)
from fedtune.training.batches import batches

RECIPE = Path(__file__).parents[1] / "recipes" / "sentiment.yaml"
OVERRIDES = [
    "federation.rounds=2",
    "train.group_by_length=true",
    "train.local_steps=5",
    "evaluation.every_n_rounds=2",
    "data.splits={validation: 0.01, test: 0.01}",
]
REPEATS = 5


def main() -> None:
    recipe = resolve_recipe(read_recipe(RECIPE, OVERRIDES))
    shop = get_run_context(recipe.model_dump_json())
    start = get_model_state(shop.model, shop.shared_names)
    _ = shop.train, shop.client_rows, shop.validation, shop.test
    bare(shop)
    pairs = []
    for repeat in range(REPEATS):
        set_model_state(shop.model, start)
        loop = timed(partial(bare, shop))
        set_model_state(shop.model, start)
        engine = timed(partial(engine_run, shop, f"repeat-{repeat}"))
        pairs.append({"bare_seconds": loop, "engine_seconds": engine, "ratio": engine / loop})
    ratio = statistics.median(pair["ratio"] for pair in pairs)
    save("overhead", {"overrides": OVERRIDES, "pairs": pairs, "median_ratio": ratio})


def timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def engine_run(shop: RunContext, run: str) -> None:
    """The whole run, store and checkpoints included, in a folder of its own; the model is built already, for both."""
    set_run_context(shop)
    with tempfile.TemporaryDirectory() as folder:
        url = make_file_url(Path(folder) / "store.sqlite")
        with Store.open(url) as store:
            recipe = shop.recipe
            store.create_run(
                id=run,
                name=recipe.name,
                recipe=recipe.model_dump_json(),
                seed=recipe.seed,
                engine="in-process",
                rounds_planned=recipe.federation.rounds,
            )
        run_in_process(shop, run, url, workers=1)


def bare(shop: RunContext) -> None:
    """The same steps and the same scoring, by hand."""
    recipe, settings = shop.recipe, shop.recipe.train
    evaluate_model(EvaluatedModel(shop.model, get_task(recipe.task), recipe.evaluation.batch_size), shop.validation)
    for number in range(1, recipe.federation.rounds + 1):
        begin_round(shop.techniques, shop.model, number)
        parameters = dict(shop.model.named_parameters())
        chosen = [parameters[name] for name in list_trainable_tensors(shop.model)]
        for client, indices in enumerate(shop.client_rows):
            with use_cpu_threads(settings.threads):
                seed = derive_seed(recipe.seed, number, client, "order")
                order = batches(indices, settings.batch_size, settings.local_steps or 1, seed, shop.train.lengths)
                client_steps(shop, chosen, order)
    for part in (shop.validation, shop.test, shop.test):
        evaluate_model(EvaluatedModel(shop.model, get_task(recipe.task), recipe.evaluation.batch_size), part)


def client_steps(shop: RunContext, chosen: list[nn.Parameter], order: Iterable[list[int]]) -> None:
    optimiser = torch.optim.AdamW(chosen, lr=shop.recipe.train.lr, weight_decay=shop.recipe.train.weight_decay)
    shop.model.train()
    for indices in order:
        loss = shop.model(**shop.train.make_batch(indices)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(chosen, shop.recipe.train.max_grad_norm or float("inf"))
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
