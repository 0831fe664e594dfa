"""Claims about DEFT, trained in one place by a plain loop: the same PEFT with and without the density term.

minilm  MiniLM with ReLU, four-domain sentiment: the density falls by at least 50.72 % (relative) at no more than one
        point of mean accuracy. Of ALPHAS the sparsest is chosen that loses at most a point on the validation part,
        mean over seeds; every model is scored on both parts and the claim is the chosen one's on the test part.
swiglu  SmolLM2 on film reviews, deployed density 30 %: after DEFT the held-out loss is lower than after magnitude
        thresholding at equal density, both of the untrained base and of the same PEFT. Every model scored has its
        smallest |P| really zeroed, by one threshold per layer, a quantile over training texts. alpha was chosen on
        the validation part with seed 0: 1 gives 4.763, 3 gives 4.756, 10 gives 4.804, 50 gives 5.407.
cost    Training time and bytes kept for the backward pass, with the term over without, steps of both taking turns.

Run: python -m benchmarks.deft minilm|swiglu|cost [--seeds 3] [--steps N] [--alpha A ...] [--eps E]
     [--peft "lora, bias"]; swiglu scores the validation part with --part validation, to choose settings
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.report import save
from fedtune.memory import StorageMeter
from fedtune.recipe.yaml_file import read_recipe
from fedtune.simulation import resolve_recipe
from fedtune.tasks import get_task
from fedtune.techniques import begin_step
from fedtune.techniques.deft._density_probe import calibrate_thresholds
from fedtune.techniques.deft.deft import get_probes
from fedtune.training import (
    EvaluatedModel,
    RunContext,
    clear_run_context,
    compute_step_loss,
    evaluate_model,
    get_run_context,
    set_train_mode,
)
from fedtune.training.batches import batches

RECIPES = Path(__file__).parents[1] / "recipes"
MINILM = ["train.batch_size=16", "train.lr=1e-3", "train.max_length=40", "evaluation.batch_size=128"]
SWIGLU = [
    "train.batch_size=8",
    "train.lr=3e-4",
    "train.max_length=48",
    "train.optimiser=adamw",
    "evaluation.batch_size=32",
]
ALPHAS = (0.18, 0.2)
FIGURES = ("density", "mean_accuracy")
WARMUP = 0.06
DEPLOYED = 0.3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("claim", choices=["minilm", "swiglu", "cost"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--part", choices=["validation", "test"], default="test")
    parser.add_argument("--alpha", type=float, nargs="+")
    parser.add_argument("--eps", type=float)
    parser.add_argument("--peft", default="lora")
    arguments = parser.parse_args()
    claims: dict[str, Callable[[argparse.Namespace], None]] = {"minilm": minilm, "swiglu": swiglu, "cost": cost}
    claims[arguments.claim](arguments)


def minilm(arguments: argparse.Namespace) -> None:
    steps, eps, alphas = arguments.steps or 1600, arguments.eps or 3e-2, arguments.alpha or ALPHAS
    rows = []
    for seed in range(arguments.seeds):
        for alpha in (0.0, *alphas):
            term = f"deft: {{alpha: {alpha}, eps: {eps if alpha else 1e-7}, relu: true}}"
            shop = built("deft.yaml", f"{arguments.peft}, {term}", seed, MINILM)
            seconds = fine_tune(shop, steps, seed)
            parts = {part: scored(shop, part) for part in ("validation", "test")}
            rows.append({"seed": seed, "arm": str(alpha), "seconds": seconds, **parts})
            print(rows[-1], file=sys.stderr, flush=True)
        found = {part: {str(alpha): against_peft(rows, str(alpha), part) for alpha in alphas} for part in parts}
        within = [arm for arm, figures in found["validation"].items() if figures["points_lost"] <= 1]
        chosen = max(within, key=lambda arm: found["validation"][arm]["reduction"], default=str(min(alphas)))
        claim = {"chosen_alpha": float(chosen), **found["test"][chosen]}
        save("deft-minilm", {"steps": steps, "eps": eps, "rows": rows, **found, "claim": claim})


def against_peft(rows: list[dict[str, Any]], arm: str, part: str) -> dict[str, float]:
    """The relative density reduction and the points of accuracy lost to alpha 0, of means over seeds."""
    plain, term = (
        {name: statistics.mean(row[part][name] for row in rows if row["arm"] == one) for name in FIGURES}
        for one in ("0.0", arm)
    )
    lost = 100 * (plain["mean_accuracy"] - term["mean_accuracy"])
    return {"reduction": 1 - term["density"] / plain["density"], "points_lost": lost}


def swiglu(arguments: argparse.Namespace) -> None:
    steps, term = arguments.steps or 40, ((arguments.alpha or [3.0])[0], arguments.eps or 0.1)
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        arms = {"base": (0, 0.0, 1e-7), "peft": (steps, 0.0, 1e-7), "deft": (steps, *term)}
        for name, (trained_steps, alpha, eps) in arms.items():
            if name == "base" and seed:
                continue  # nothing in it depends on the seed but the calibration texts
            shop = built("lm.yaml", f"{arguments.peft}, deft: {{alpha: {alpha}, eps: {eps}}}", seed, SWIGLU)
            row = {
                "seed": seed,
                "arm": name,
                "alpha": alpha,
                "eps": eps,
                "seconds": fine_tune(shop, trained_steps, seed),
            }
            rows.append({**row, **deployed(shop, arguments.part, seed)})
            print(rows[-1], file=sys.stderr, flush=True)
        losses = {f"{name}_loss": mean(rows, name, "loss") for name in arms}
        save(result("deft-swiglu", arguments), {"steps": steps, "part": arguments.part, "rows": rows, **losses})


def deployed(shop: RunContext, part: str, seed: int) -> dict[str, float]:
    """Figures with the smallest |P| zeroed, by thresholds from 64 training texts, and the loss before that."""
    dense = scored(shop, part)["loss"]
    texts = next(batches(np.arange(len(shop.train)), 64, 1, seed))
    calibrate_thresholds(shop.model, get_probes(shop.model), [inputs(shop, texts)], DEPLOYED)
    return {"dense_loss": dense, **scored(shop, part)}


def cost(arguments: argparse.Namespace) -> None:
    cases = {
        "minilm-relu": ("deft.yaml", MINILM, "deft: {alpha: 0, relu: true}", "deft: {relu: true}"),
        "minilm-gelu": ("deft.yaml", MINILM, "", "deft"),
        "smollm2": ("lm.yaml", SWIGLU, "", "deft"),
    }
    rows = []
    for name, (file, settings, plain, term) in cases.items():
        for peft in ("lora", "lora: {trained_factors: b-only}"):
            shops = [built(file, ", ".join(filter(None, (peft, one))), 0, settings) for one in (plain, term)]
            rows.append({"case": name, "peft": peft, **compared(shops, arguments.steps or 12)})
            print(rows[-1], file=sys.stderr, flush=True)
    save("deft-cost", {"rows": rows})


def built(file: str, techniques: str, seed: int, settings: list[str]) -> RunContext:
    """A fresh model; where clients alternate between low-rank factors, both are trained in every step."""
    clear_run_context()
    recipe = read_recipe(RECIPES / file, [f"seed={seed}", *settings, f"train.techniques=[{techniques}]"])
    shop = get_run_context(resolve_recipe(recipe).model_dump_json())
    clear_run_context()
    if "freeze-a" not in techniques:
        for name in shop.shared_names:
            shop.model.get_parameter(name).requires_grad_(True)
    return shop


def fine_tune(shop: RunContext, steps: int, seed: int) -> float:
    """Train on all examples together: warm-up, then linearly to zero; returns the seconds."""
    settings, started = shop.recipe.train, time.perf_counter()
    torch.manual_seed(seed)
    trained = [parameter for parameter in shop.model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay)
    lengths = shop.train.lengths if settings.group_by_length else None
    set_train_mode(shop.model)
    for step, chosen in enumerate(batches(np.arange(len(shop.train)), settings.batch_size, steps, seed, lengths)):
        for group in optimiser.param_groups:
            group["lr"] = settings.lr * min(1, (step + 1) / (WARMUP * steps)) * (1 - step / steps)
        one_step(shop, shop.train.make_batch(chosen), step / steps)
        nn.utils.clip_grad_norm_(trained, settings.max_grad_norm or torch.inf)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def one_step(shop: RunContext, batch: dict[str, torch.Tensor], progress: float) -> None:
    begin_step(shop.techniques, shop.model, batch, progress)
    compute_step_loss(shop.task, shop.model, batch).backward()


def scored(shop: RunContext, part: str) -> dict[str, float]:
    recipe = shop.recipe
    found = evaluate_model(
        EvaluatedModel(shop.model, get_task(recipe.task), recipe.evaluation.batch_size, shop.techniques),
        getattr(shop, part),
    )
    whole = {one.name: one.value for one in found if one.domain == "all"}
    return {**whole, **{f"mean_{one.name}": one.value for one in found if one.domain == "mean"}}


def inputs(shop: RunContext, chosen: list[int]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in shop.train.make_batch(chosen).items() if name != "labels"}


def compared(shops: list[RunContext], pairs: int) -> dict[str, Any]:
    """Seconds and kept bytes of plain and term; the ratio of times is the median over pairs of neighbouring steps."""
    batch = shops[0].train.make_batch(range(shops[0].recipe.train.batch_size))
    kept = [kept_bytes(shop, batch) for shop in shops]
    taken = [[seconds(shop, batch) for shop in shops] for _ in range(pairs)]
    plain, term = (statistics.median(one) for one in zip(*taken, strict=True))
    ratio = statistics.median(after / before for before, after in taken)
    sizes = {"plain_kept_bytes": kept[0], "deft_kept_bytes": kept[1], "kept_ratio": kept[1] / kept[0]}
    return {"plain_seconds": plain, "deft_seconds": term, "time_ratio": ratio, **sizes}


def kept_bytes(shop: RunContext, batch: dict[str, torch.Tensor]) -> int:
    set_train_mode(shop.model)
    begin_step(shop.techniques, shop.model, batch, 0.5)
    with StorageMeter(excluded=[*shop.model.parameters(), *shop.model.buffers()]) as meter:
        loss = compute_step_loss(shop.task, shop.model, batch)
        kept = meter.current_bytes
    loss.backward()
    return kept


def seconds(shop: RunContext, batch: dict[str, torch.Tensor]) -> float:
    started = time.perf_counter()
    shop.model.zero_grad()
    one_step(shop, batch, 0.5)
    return time.perf_counter() - started


def mean(rows: list[dict[str, Any]], arm: str, figure: str) -> float:
    return statistics.mean(float(row[figure]) for row in rows if row["arm"] == arm)


def result(name: str, arguments: argparse.Namespace) -> str:
    return name if arguments.part == "test" else f"{name}-{arguments.part}"


if __name__ == "__main__":
    main()
