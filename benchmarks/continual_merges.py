"""Claim (g6): AIM at the border of tasks is on one trade curve with its controls; it is not expected to win.

1,797 digits of 8 x 8, two classes at a time: a class stream of five tasks with three rounds each, four clients
(Dirichlet(1) per class within each task), and a network with one hidden layer of 128 units that is trained whole from
random weights. The loss compares the classes of the task alone (``loss: new``), as it must without stored examples.
Arms differ in ``stream.consolidate`` alone. For AIM at each omega the control is ``shrink`` with ``factor: aim``: it
scales each tensor by the mean of AIM's factors. ``average`` with several shares is the plain curve. Nothing is chosen
by the figures: all arms are published. The test split is scored once per border.

Figures: final = mean accuracy over all tasks after the last one, in percent; forgetting = mean over earlier tasks of
(best so far - last); learning = mean accuracy of each task when it has just ended. With ``--setting task``, the task is
known at test.

Run: python -m benchmarks.continual_merges [--seeds 3] [--arms "naive;aim 0"] [--setting class] [--source sample:...]
Rows that were measured before with the same settings are kept.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from benchmarks.report import save
from fedtune.models.classifier import ImageClassifier
from fedtune.models.image_model_files import save_image_model
from fedtune.models.kinds import IMAGE_MODEL_CLASSES
from fedtune.models.logistic import GreyPixels

RESULTS = Path(__file__).parent / "results"
OMEGAS = (0.0, 0.2, 0.4, 0.7)
SHARES = (0.1, 0.25, 0.5, 0.75)
ARMS: dict[str, list[Any]] = {
    "naive": [],
    **{f"aim {omega:g}": [{"aim": {"omega": omega}}] for omega in OMEGAS},
    **{f"shrink {omega:g}": [{"shrink": {"factor": "aim", "omega": omega}}] for omega in OMEGAS},
    **{f"average {share:g}": [{"average": {"share": share}}] for share in SHARES},
    "average": ["average"],
    "fisher": ["fisher"],
    "experts mean": ["experts"],
    "experts mean, sequential": [{"experts": {"start": "sequential"}}],
    "experts magmax": [{"experts": {"merge": ["magmax"]}}],
    "experts magmax, sequential": [{"experts": {"merge": ["magmax"], "start": "sequential"}}],
    "experts opcm": [{"experts": {"merge": ["opcm"]}}],
    "experts ties": [{"experts": {"merge": ["ties"]}}],
}
TASKS = 5


class Perceptron(ImageClassifier):
    """One hidden layer on grey pixels."""

    kind: ClassVar[str] = "pixel-perceptron"
    head_name: ClassVar[str] = "classifier"

    def __init__(self, labels: int, side: int = 8, width: int = 128) -> None:
        super().__init__(side=side, width=width)
        self.hidden = nn.Sequential(GreyPixels(side), nn.Linear(side**2, width), nn.ReLU())
        self.classifier = nn.Linear(width, labels)

    def stages(self) -> list[nn.Module]:
        """The hidden layer and the head."""
        return [self.hidden, self.classifier]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", default=";".join(ARMS), help="separated by semicolons")
    parser.add_argument("--setting", choices=["class", "task"], default="class")
    parser.add_argument("--source", default="sample:digits")
    parser.add_argument("--train", type=int, default=None)
    arguments = parser.parse_args()
    about = {"setting": arguments.setting, "source": arguments.source, "train": arguments.train}
    name = f"continual_merges-{arguments.setting}"
    rows = read_rows(name, about)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEDTUNE_HOME"] = folder
        for seed in range(arguments.seeds):
            save_model(Path(folder) / f"perceptron-{seed}", seed)
            for arm in arguments.arms.split(";"):
                if any((row["seed"], row["arm"]) == (seed, arm) for row in rows):
                    continue
                rows.append({"seed": seed, "arm": arm, **measure(make_recipe(folder, arm, seed, about))})
                print(rows[-1], file=sys.stderr, flush=True)
                save(name, {**about, "arms": summarise(rows), "aim_minus_shrink": compare(rows), "rows": rows})


def read_rows(name: str, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that an earlier call saved with the same settings."""
    file = RESULTS / f"{name}.json"
    before: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return list(before["rows"]) if all(before.get(key) == value for key, value in about.items()) else []


def save_model(folder: Path, seed: int) -> None:
    """Save random weights; the head is drawn anew from the run's seed."""
    IMAGE_MODEL_CLASSES[Perceptron.kind] = Perceptron
    folder.mkdir()
    torch.manual_seed(seed)
    save_image_model(Perceptron(2), folder)


def make_recipe(folder: str, arm: str, seed: int, about: dict[str, Any]) -> dict[str, Any]:
    stream = {
        "setting": about["setting"],
        "tasks": {"size": 2, "order": "seed", "rounds": 3},
        "consolidate": ARMS[arm],
        **({"loss": "new"} if about["setting"] == "class" else {}),
    }
    return {
        "version": 2,
        "name": "merges",
        "seed": seed,
        "task": "image-classification",
        "model": {"source": f"path:{folder}/perceptron-{seed}"},
        "data": {
            "source": about["source"],
            "max_train_examples": about["train"],
            "partition": {"kind": "dirichlet", "alpha": 1.0},
        },
        "devices": [{"name": "phone", "count": 4, "memory": "512MB"}],
        "train": {
            "techniques": ["full"],
            "lr": 3e-3,
            "lr_schedule": "linear",
            "batch_size": 16,
            "image_size": 8,
            "local_epochs": 3,
            "threads": 1,
        },
        "stream": stream,
        "evaluation": {"every_n_rounds": 15},
    }


def measure(recipe: dict[str, Any]) -> dict[str, Any]:
    """A run: the matrix of accuracies after each task, its figures, and the bytes that clients sent and got."""
    import fedtune
    from fedtune.recipe.schema import Recipe

    started = time.process_time()
    run = fedtune.simulate(Recipe.model_validate(recipe))
    borders = [read_border(record) for record in run.rounds if record.number % 3 == 0 and record.number]
    names = [name for name in borders[-1] if name not in ("all", "mean")]
    order = sorted(names, key=lambda name: next(place for place, row in enumerate(borders) if name in row))
    if recipe["stream"]["setting"] == "task":
        order = [task.name for task in run.recipe.stream.tasks]  # type: ignore[union-attr]
    matrix: list[list[Any]] = [[row.get(name) for name in order] for row in borders]
    sent = [one.bytes_up for record in run.rounds for one in record.client_records]
    return {
        "matrix": matrix,
        **compute_figures(matrix),
        "megabytes_up": sum(sent) / 4e6,
        "cpu": time.process_time() - started,
    }


def read_border(record: Any) -> dict[str, float]:
    return {one.domain: one.value for one in record.metrics if (one.split, one.name) == ("border", "accuracy")}


def compute_figures(matrix: Sequence[Sequence[float]]) -> dict[str, float]:
    """In percent, by the matrix R[after task i][on task j]."""
    last = len(matrix) - 1
    forgotten = [max(matrix[i][j] for i in range(j, last)) - matrix[last][j] for j in range(last)]
    return {
        "final": 100 * statistics.mean(matrix[last]),
        "forgetting": 100 * statistics.mean(forgotten),
        "learning": 100 * statistics.mean(matrix[j][j] for j in range(last + 1)),
    }


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means and standard deviations over seeds, by arm."""
    found = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        figures = {
            key: {"mean": round(statistics.mean(row[key] for row in own), 2), "sd": deviate([row[key] for row in own])}
            for key in ("final", "forgetting", "learning")
        }
        found.append({"arm": arm, "seeds": len(own), **figures})
    return found


def deviate(values: Sequence[float]) -> float | None:
    return round(statistics.stdev(values), 2) if len(values) > 1 else None


def compare(rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Final accuracy of AIM minus that of its control, in points, by seed."""
    by = {(row["arm"], row["seed"]): row["final"] for row in rows}
    return {
        f"{omega:g}": [
            round(by[f"aim {omega:g}", seed] - by[f"shrink {omega:g}", seed], 2)
            for seed in sorted({row["seed"] for row in rows})
            if {(f"aim {omega:g}", seed), (f"shrink {omega:g}", seed)} <= by.keys()
        ]
        for omega in OMEGAS
    }


if __name__ == "__main__":
    main()
