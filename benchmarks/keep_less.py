"""Ways to keep less for backward, side by side: kept bytes, processor time and accuracy after as many steps.

``kept_bytes`` and ``peak_bytes`` are those of the meter for one step on random texts. ``seconds`` is processor time of
forward and backward pass on one thread, the median of the later of ``--repeats`` runs. Accuracy is that of MiniLM on
four-domain sentiment after STEPS steps of the same loop for each (AdamW, linear decay, no rounds), at one rate for each
kind; nothing was searched. ``compact`` thus explores a single subspace, and ``badam`` is left out of accuracies: both
need rounds. With ``--short`` there are fewer steps, texts and repetitions.

Run: python -m benchmarks.keep_less [--short] [--seeds 3] [--repeats 5]
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.report import save
from fedtune import techniques
from fedtune.profiling import make_random_batch
from fedtune.profiling.measure_step import measure_step_memory
from fedtune.recipe.schema import Recipe
from fedtune.recipe.yaml_file import read_recipe
from fedtune.simulation import resolve_recipe
from fedtune.tasks import get_task
from fedtune.training import (
    EvaluatedModel,
    RunContext,
    compute_step_loss,
    evaluate_model,
    get_run_context,
    prepare_model,
    set_train_mode,
)
from fedtune.training.batches import batches

RECIPES = Path(__file__).parents[1] / "recipes"
MINILM = (
    "[full]",
    "[full, gradient-checkpointing]",
    "[full, selective-checkpointing]",
    "[full, int8-activations]",
    "[full, division]",
    "[compact]",
    "[badam]",
    "[{offload: {blocks_in_memory: 1}}, full]",
    "[meft]",
    "[meft: {num_chunks: 2}]",
    "[lora, gradient-checkpointing]",
)
SMOLLM2 = (
    "[lora, fused-cross-entropy]",
    "[lora, fused-cross-entropy, gradient-checkpointing]",
    "[lora, fused-cross-entropy, int8-activations]",
    "[lora, fused-cross-entropy, offload]",
    "[lora, fused-cross-entropy, token-drop: {group_size: 16}]",
    "[meft, fused-cross-entropy]",
)
RATES = {
    "[full]": 1e-4,
    "[full, gradient-checkpointing]": 1e-4,
    "[full, int8-activations]": 1e-4,
    "[full, division]": 1e-4,
    "[compact]": 1e-4,
    "[meft]": 2e-3,
}


class Size(NamedTuple):
    """How much is done."""

    steps: int
    batch: int
    length: int
    test_texts: int


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    size = Size(40, 8, 48, 200) if given.short else Size(400, 16, 64, 4000)
    rows: dict[str, list[dict[str, Any]]] = {"minilm 16 x 128": [], "smollm2 1 x 128": [], "accuracy": []}
    result: dict[str, Any] = {"short": given.short, **size._asdict(), "rows": rows}
    for listed in MINILM:
        shape = ("train.batch_size=16", "train.max_length=128")
        _note(rows["minilm 16 x 128"], _measure("sentiment", listed, shape, given.repeats))
    for listed in SMOLLM2:
        shape = ("train.batch_size=1", "train.max_length=128")
        _note(rows["smollm2 1 x 128"], _measure("lm", listed, shape, given.repeats))
    save("keep_less", result)  # what follows takes longest
    for listed, rate in RATES.items():
        found = [_train(listed, rate, seed, size) for seed in range(given.seeds)]
        mean = statistics.mean(found)
        _note(rows["accuracy"], {"techniques": listed, "rate": rate, "test": found, "mean": mean})
    save("keep_less", result)


def _note(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    rows.append(row)
    print(json.dumps(row), file=sys.stderr, flush=True)


def _resolve(name: str, listed: str, *overrides: str) -> Recipe:
    own = ("train.optimiser=adamw", "train.max_grad_norm=1.0", "merge=[mean]")
    return resolve_recipe(read_recipe(RECIPES / f"{name}.yaml", [f"train.techniques={listed}", *own, *overrides]))


def _measure(name: str, listed: str, shape: tuple[str, ...], repeats: int) -> dict[str, Any]:
    recipe = _resolve(name, listed, *shape)
    labels = ("negative", "positive") if get_task(recipe.task).has_classes else ()
    model, chosen, _ = prepare_model(recipe, labels)
    batch = make_random_batch(model, recipe, len(labels))
    kept, peak = measure_step_memory(model, chosen, batch, recipe, 1)
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        techniques.begin_step(chosen, model, batch, 0.0)
        compute_step_loss(get_task(recipe.task), model, batch).backward()
        seconds.append(time.process_time() - started)
        model.zero_grad()
    keeper = vars(model).get("offload")
    written = {} if keeper is None else {"written_bytes_per_step": keeper.file.written_bytes // (repeats + 1)}
    figures = {"kept_bytes": kept, "peak_bytes": peak, "seconds": statistics.median(seconds[1:])}
    return {"techniques": listed, **figures, **written}


def _train(listed: str, rate: float, seed: int, size: Size) -> float:
    """Train in one place and return the mean accuracy over domains on the test part."""
    shape = (f"train.batch_size={size.batch}", f"train.max_length={size.length}", f"train.lr={rate}", f"seed={seed}")
    context = get_run_context(_resolve("sentiment", listed, *shape).model_dump_json())
    model, chosen, settings = context.model, context.techniques, context.recipe.train
    techniques.begin_round(chosen, model, 1)
    torch.manual_seed(seed)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    set_train_mode(model)
    rows = list(range(len(context.train)))
    for step, part in enumerate(batches(torch.tensor(rows).numpy(), settings.batch_size, size.steps, seed, None)):
        optimiser.param_groups[0]["lr"] = rate * (1 - step / size.steps)
        batch = context.train.make_batch(part)
        techniques.begin_step(chosen, model, batch, step / size.steps)
        compute_step_loss(get_task(context.recipe.task), model, batch).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
    return _score(context, size.test_texts)


def _score(context: RunContext, most: int) -> float:
    evaluated = EvaluatedModel(context.model, get_task(context.recipe.task), 32, context.techniques)
    step = max(1, len(context.test) // most)
    scores = evaluate_model(evaluated, context.test, range(0, len(context.test), step))
    return next(one.value for one in scores if (one.domain, one.name) == ("mean", "accuracy"))


if __name__ == "__main__":
    main()
