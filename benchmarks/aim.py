"""Claim: AIM on real fine-tunes is at least the uniform-shrink control on the mean task score, in 3 seeds.

Models are those of benchmarks.aim_models. Each combining step (weight 1 per model; ``mean`` divides by their number) is
scored as it is, relaxed by AIM at every omega of OMEGAS, and shrunk by AIM's mean factor on each tensor at the same
omega. Nothing is chosen by scores: the whole curve is saved and drawn, whatever it shows.
minilm    mean accuracy over the four domains; higher is better.
smollm2   mean loss over the three domains, and loss on ``neutral`` text no model was tuned on; lower is better. Base
          ability holds where AIM's neutral loss is at most that of the merge without it.
The learning rate is the one of RATES whose fine-tunes do best on validation sentences of their own domains, seed 0.
Scores are of the test part, the first TEXTS sentences of each domain.

Run: python -m benchmarks.aim --part minilm|smollm2 [--seeds 0 1 2] [--steps N] [--texts N] [--omegas ...] [--lr X]
Rows of seeds run before are kept, so that seeds can be run one at a time; --lr skips the choice.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.aim_models import NEUTRAL, Tuned, evaluated, merged, minilm, smollm2
from benchmarks.report import save
from fedtune import merging
from fedtune.recipe.schema import Unit

RESULTS = Path(__file__).parent / "results"
METHODS: dict[str, Unit] = {
    "mean": Unit(name="linear"),
    "task arithmetic": Unit(name="task-arithmetic"),
    "ties": Unit(name="ties"),
}
OMEGAS = (0.2, 0.4, 0.6, 0.8)
MAKE: dict[str, Callable[[int, float, int, Path], Tuned]] = {"minilm": minilm, "smollm2": smollm2}
FIGURE = {"minilm": "accuracy", "smollm2": "loss"}
RATES = {"minilm": (1e-4, 3e-4), "smollm2": (1e-3, 3e-3)}
STEPS = {"minilm": 150, "smollm2": 32}
TEXTS = {"minilm": 300, "smollm2": 32}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=list(MAKE), required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--texts", type=int)
    parser.add_argument("--omegas", type=float, nargs="+", default=OMEGAS)
    parser.add_argument("--lr", type=float)
    arguments = parser.parse_args()
    part, figure = arguments.part, FIGURE[arguments.part]
    steps, texts = arguments.steps or STEPS[part], arguments.texts or TEXTS[part]
    rates = {} if arguments.lr else rated(part, steps, texts)
    lr = arguments.lr or best(rates, figure)
    about = {"figure": figure, "steps": steps, "texts": texts, "lr": lr, "rates": {str(k): v for k, v in rates.items()}}
    rows = kept(f"aim-{part}", about, arguments.seeds)
    for seed in arguments.seeds:
        for row in scored(part, seed, lr, steps, texts, arguments.omegas):
            rows.append({"seed": seed, **row})
            print(rows[-1], file=sys.stderr, flush=True)
        save(f"aim-{part}", {**about, "rows": rows, "claim": claim(rows, figure)})
        draw(rows, figure, RESULTS / f"aim-{part}.png")


def rated(part: str, steps: int, texts: int) -> dict[float, float]:
    """The mean over fine-tunes of each one's validation figure on its own domain, by learning rate."""
    found = {}
    for lr in RATES[part]:
        with tempfile.TemporaryDirectory() as folder:
            tuned = MAKE[part](0, lr, steps, Path(folder))
            found[lr] = statistics.mean(alone(tuned, domain, "validation", part, texts) for domain in tuned.operands)
    return found


def alone(tuned: Tuned, domain: str, part: str, model: str, texts: int) -> float:
    """What one fine-tune scores on its own domain."""
    single = Tuned(tuned.shop, tuned.base, {domain: tuned.operands[domain]}, tuned.evidence)
    state = merged(single, merging.build_pipeline([Unit(name="linear")]))
    return evaluated(tuned, state, part, FIGURE[model], texts)[domain]


def best(rates: dict[float, float], figure: str) -> float:
    ranked = sorted(rates, key=lambda lr: rates[lr])
    return ranked[-1 if figure == "accuracy" else 0]


def kept(name: str, about: dict[str, Any], seeds: list[int]) -> list[dict[str, Any]]:
    """Rows of other seeds that an earlier call saved with the same settings."""
    path = RESULTS / f"{name}.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    same = all(before.get(key) == value for key, value in about.items() if key != "rates")
    return [row for row in before.get("rows", []) if row["seed"] not in seeds] if same else []


def scored(part: str, seed: int, lr: float, steps: int, texts: int, omegas: list[float]) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        tuned = MAKE[part](seed, lr, steps, Path(folder))
        took = time.perf_counter() - started
        own = {domain: alone(tuned, domain, "test", part, texts) for domain in tuned.operands}
        outshone = len(merging.find_dominated_weights(tuned.evidence.activation_statistics)) / len(
            tuned.evidence.activation_statistics
        )
        yield {"arm": "alone", **figures(own, own), "outshone": outshone, "seconds": took}
        yield {"arm": "base", **figures(evaluated(tuned, tuned.base, "test", FIGURE[part], texts), own)}
        for method in METHODS:
            for arm, omega, relax in arms(omegas):
                state = merged(tuned, merging.build_pipeline([METHODS[method], *relax]))
                domains = evaluated(tuned, state, "test", FIGURE[part], texts)
                yield {"method": method, "arm": arm, "omega": omega, **figures(domains, own)}


def arms(omegas: list[float]) -> Iterator[tuple[str, float | None, list[Unit]]]:
    yield "plain", None, []
    for omega in omegas:
        yield "aim", omega, [Unit(name="aim", settings={"omega": omega})]
        yield "shrink", omega, [Unit(name="shrink", settings={"omega": omega})]


def figures(domains: dict[str, float], tuned: dict[str, float]) -> dict[str, Any]:
    """The mean over domains somebody was tuned on, and the neutral one's apart."""
    mean = statistics.mean(value for domain, value in domains.items() if domain in tuned)
    neutral = {"neutral": domains[NEUTRAL]} if NEUTRAL in domains and NEUTRAL not in tuned else {}
    return {"mean": mean, **neutral, "domains": domains}


def means(rows: list[dict[str, Any]], method: str, arm: str, name: str) -> dict[float | None, float]:
    """Mean over seeds by omega."""
    found: dict[float | None, list[float]] = {}
    for row in rows:
        if (row.get("method"), row["arm"]) == (method, arm) and name in row:
            found.setdefault(row["omega"], []).append(row[name])
    return {omega: statistics.mean(values) for omega, values in found.items()}


def claim(rows: list[dict[str, Any]], figure: str) -> dict[str, Any]:
    """By how much AIM is better than the control and than the plain merge (positive is better), means over seeds."""
    sign, told = (1 if figure == "accuracy" else -1), {}
    for method in METHODS:
        [plain] = means(rows, method, "plain", "mean").values()
        aim, shrink = (means(rows, method, arm, "mean") for arm in ("aim", "shrink"))
        told[method] = {
            "over_control": {str(omega): sign * (aim[omega] - shrink[omega]) for omega in aim},
            "over_plain": {str(omega): sign * (aim[omega] - plain) for omega in aim},
        }
        if neutral := means(rows, method, "plain", "neutral"):
            found = means(rows, method, "aim", "neutral")
            told[method]["neutral_over_plain"] = {str(omega): neutral[None] - loss for omega, loss in found.items()}
    return told


def draw(rows: list[dict[str, Any]], figure: str, path: Path) -> None:
    """The omega curve of each method, AIM beside its control; omega 1 is the plain merge."""
    names = ["mean", "neutral"] if any("neutral" in row for row in rows) else ["mean"]
    picture = Figure(figsize=(4 * len(METHODS), 3.2 * len(names)), layout="constrained")
    panels = picture.subplots(len(names), len(METHODS), squeeze=False)
    for place, name in enumerate(names):
        for panel, method in zip(panels[place], METHODS, strict=True):
            for arm, style in (("aim", "o-"), ("shrink", "s--")):
                curve = {**means(rows, method, arm, name), 1.0: means(rows, method, "plain", name)[None]}
                panel.plot(list(curve), list(curve.values()), style, label=arm)
            panel.set(title=method, xlabel="omega", ylabel=f"{figure}, {name}")
            panel.legend()
    picture.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
