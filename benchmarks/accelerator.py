"""Checks fedtune on a machine with a card; without one it refuses.

Each technique trains a round on a tiny model on the CPU and on the card, without dropout. ``error`` is the norm of the
difference of the deltas over that of the CPU's. Then a small simulation runs twice on the card, whose checkpoints
should be equal, and the techniques are profiled on a small language model with torch's own memory figures.
``failed`` lists what is out of bounds.

Run: python -m benchmarks.accelerator
"""

import math
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fedtune
from benchmarks.report import save
from fedtune import techniques
from fedtune.accelerator import choose_device
from fedtune.errors import FedtuneError
from fedtune.library.tiny_models import TINY_MODELS, TinyModel
from fedtune.profiling import format_techniques, list_profiled_techniques, make_profile_cases, profile_in_subprocess
from fedtune.recipe.schema import Recipe, TaskUnit, Unit
from fedtune.tasks import get_task
from fedtune.training import ClientRound, LocalTrainingResult, get_model_state, train_local_model

TOLERANCE = 1e-2
"""The largest relative error of a delta in fp32. Kernels of a card may use TF32 and other orders of addition."""


class Examples:
    """Eight examples of a tiny model."""

    domains = lengths = None

    def __init__(self, tiny: TinyModel) -> None:
        parts = [tiny.make_batch(seed) for seed in (1, 5)]
        self._tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def __len__(self) -> int:
        return 8

    def make_batch(self, indices: Any) -> dict[str, Tensor]:
        """Return the chosen examples."""
        return {name: tensor[torch.as_tensor(list(indices))] for name, tensor in self._tensors.items()}


def main() -> None:
    device = choose_device("auto")
    if device.type == "cpu":
        sys.exit("benchmarks.accelerator needs a card, and torch finds neither CUDA nor MPS on this machine")
    warnings.simplefilter("ignore")
    rounds = [
        row for units in list_profiled_techniques() for tiny in TINY_MODELS if (row := compare(units, tiny, device))
    ]
    simulated, profiled = simulate_twice(), profile(device)
    failed = [row for row in rounds if row.get("problem") or row["error"] > TOLERANCE]
    failed += [] if simulated["equal"] else [simulated]
    failed += [row for row in profiled if row.get("problem")]
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    save(
        "accelerator", {"card": name, "failed": failed, "rounds": rounds, "simulated": simulated, "profiled": profiled}
    )
    sys.exit(f"{len(failed)} checks failed" if failed else 0)


def compare(units: list[Unit], tiny: TinyModel, device: torch.device) -> dict[str, Any] | None:
    """Return how far a round on the card is from that on the CPU; None where the technique does not fit the model."""
    label = {"technique": format_techniques(units), "model": tiny.name}
    try:
        wanted = train(units, tiny, torch.device("cpu"))
    except FedtuneError:
        return None
    try:
        found = train(units, tiny, device)
    except Exception as error:
        return label | {"problem": f"{type(error).__name__}: {error}"}
    error_of_deltas = difference(found.delta, wanted.delta)
    return label | {
        "error": error_of_deltas,
        "losses": [wanted.train_loss, found.train_loss],
        "activation_bytes": [wanted.activation_bytes, found.activation_bytes],
        "accelerator_peak": found.accelerator_peak,
    }


def train(units: list[Unit], tiny: TinyModel, device: torch.device) -> LocalTrainingResult:
    """Train a round on a device, from the same start on each."""
    model, chosen = tiny.build(0), techniques.build_techniques(units)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0  # a card draws other numbers
    shared = techniques.apply_techniques(chosen, model, get_task(TaskUnit(name=tiny.task)), 7)
    state = get_model_state(model, shared)
    local = get_model_state(model, techniques.list_local_tensors(model))
    techniques.check_device_type(chosen, device.type)
    model.to(device)
    return train_local_model(
        ClientRound(model, chosen, make_recipe(tiny), Examples(tiny), np.arange(8), 1, 1, local), state
    )


def make_recipe(tiny: TinyModel) -> Recipe:
    train = {"optimiser": "sgd", "lr": 0.1, "batch_size": 4, "local_steps": 2}
    return Recipe.model_validate(
        {
            "name": "card",
            "task": tiny.task,
            "model": {"source": "path:nowhere"},
            "data": {"source": "sample:nothing"},
            "devices": [{"count": 2}],
            "train": train,
            "federation": {"rounds": 2},
        }
    )


def difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Return the norm of the difference of all tensors, relative to that of the wanted ones."""
    gaps = [float((found[name].double() - one.double()).square().sum()) for name, one in wanted.items()]
    return math.sqrt(sum(gaps) / sum(float(one.double().square().sum()) for one in wanted.values()))


def simulate_twice() -> dict[str, Any]:
    """Run the recipe of digits twice on the card; its last checkpoints should have one digest."""
    with tempfile.TemporaryDirectory() as folder:
        store = f"sqlite:///{Path(folder) / 'runs.db'}"
        overrides = ("train.device=auto", "federation.rounds=2")
        runs = [fedtune.simulate("recipes/digits.yaml", overrides=overrides, store=store) for _ in range(2)]
        last = [run.rounds[-1] for run in runs]
    digests = [None if one.checkpoint is None else one.checkpoint.sha256 for one in last]
    return {
        "equal": len(set(digests)) == 1,
        "device_type": last[0].device_type,
        "seconds": [one.seconds for one in last],
    }


def profile(device: torch.device) -> list[dict[str, Any]]:
    """Profile the baselines and meft on sample:smollm2, on the card and in fresh processes."""
    recipe = make_recipe(TINY_MODELS[0])
    changes = {"device": device.type, "batch_size": 4, "max_length": 256}
    train = recipe.train.model_copy(update=changes)
    model = recipe.model.model_copy(update={"source": "sample:smollm2"})
    cases = make_profile_cases(
        recipe.model_copy(update={"train": train, "model": model}), [[Unit(name="meft")]], (), None
    )
    rows = [profile_in_subprocess(case) for case in cases]
    return [vars(row) | ({"problem": row.error} if hasattr(row, "error") else {}) for row in rows]


if __name__ == "__main__":
    main()
