"""Server optimisers: each equals a twin of a few lines, acts on each trained factor, and survives a kill.

The twins are written from the papers in NumPy and share no code with the package.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from fedtune import checkpoint, paths
from fedtune.errors import RecipeError
from fedtune.merging import ServerOptimiserStep, build_pipeline
from fedtune.offline_merge.merge_config import MergeConfig
from fedtune.offline_merge.model_inputs import build_steps
from fedtune.recipe.schema import Unit
from fedtune.recipe.unit_registry import build_unit
from tests.federations import Ended, execute, trivial, words

Array = NDArray[np.float64]
Twin = Callable[[Array], Array]
"""The move of the state in the next round, given the merged change."""
ROUNDS = 20
SETTINGS: dict[str, dict[str, Any]] = {
    "fedavgm": {"lr": 0.7, "momentum": 0.8, "nesterov": True},
    "fedadam": {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "tau": 0.01},
    "fedyogi": {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "tau": 0.01},
    "fedadagrad": {"lr": 0.05, "beta1": 0.3, "tau": 0.01},
}
NAMES = sorted(SETTINGS)


def sgd_twin(lr: float, momentum: float, nesterov: bool) -> Twin:
    memory = {"v": 0.0}

    def move(delta: Array) -> Array:
        memory["v"] = memory["v"] * momentum + delta  # type: ignore[assignment]
        return lr * (delta + momentum * memory["v"] if nesterov else np.asarray(memory["v"]))

    return move


def adaptive_twin(kind: str, lr: float, beta1: float, tau: float, beta2: float = 0.0) -> Twin:
    memory: dict[str, Any] = {"m": 0.0, "v": tau**2}

    def move(delta: Array) -> Array:
        memory["m"] = beta1 * memory["m"] + (1 - beta1) * delta
        v, square = memory["v"], delta**2
        if kind == "fedadagrad":
            memory["v"] = v + square
        elif kind == "fedyogi":
            memory["v"] = v - (1 - beta2) * square * np.sign(v - square)
        else:
            memory["v"] = beta2 * v + (1 - beta2) * square
        return np.asarray(lr * memory["m"] / (np.sqrt(memory["v"]) + tau))

    return move


def make_twin(name: str) -> Twin:
    return sgd_twin(**SETTINGS[name]) if name == "fedavgm" else adaptive_twin(name, **SETTINGS[name])


def make_step(name: str, settings: Mapping[str, Any] | None = None) -> ServerOptimiserStep:
    step = build_unit(
        "fedtune.merging", Unit(name=name, settings=dict(SETTINGS[name] if settings is None else settings)), "merge"
    )
    assert isinstance(step, ServerOptimiserStep)
    return step


def average_local_steps(state: Array, matrices: Array, targets: Array) -> Array:
    """The mean change of clients that take three gradient steps on their own quadratics."""
    ends = []
    for matrix, target in zip(matrices, targets, strict=True):
        own = state.copy()
        for _ in range(3):
            own = own - 0.05 * matrix @ (own - target)
        ends.append(own - state)
    return np.asarray(np.mean(ends, axis=0))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_equals_its_twin_on_quadratics_that_differ(name: str) -> None:
    draw = np.random.default_rng(7)
    roots = draw.normal(size=(4, 6, 6))
    matrices = roots @ roots.transpose(0, 2, 1) / 6 + 0.1 * np.eye(6)
    targets, ours = draw.normal(size=(4, 6)), np.zeros(6)
    expected, step, twin = ours.copy(), make_step(name), make_twin(name)
    moments = {kind: torch.full((6,), value, dtype=torch.float64) for kind, value in step.initial_moments.items()}
    for _ in range(ROUNDS):
        delta = torch.from_numpy(average_local_steps(ours, matrices, targets))
        move, moments = step.compute_step(delta, moments)
        ours = ours + move.numpy()
        expected = expected + twin(average_local_steps(expected, matrices, targets))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-10)


def read_states(ended: Ended) -> list[dict[str, torch.Tensor]]:
    folder = paths.get_runs_folder()
    return [load_file(folder / record.checkpoint.path) for record in ended.rounds if record.checkpoint]


def test_the_first_round_moves_by_the_rate_times_what_the_mean_alone_moves(home: Path) -> None:
    """A server learning rate without momentum scales the change of the mean, in every tensor."""
    alone = read_states(execute(trivial("federation.rounds=1"), run="alone"))
    scaled = read_states(
        execute(trivial("federation.rounds=1", "merge=[mean, {fedavgm: {lr: 0.5, momentum: 0}}]"), run="scaled")
    )
    for name, start in alone[0].items():
        torch.testing.assert_close(scaled[1][name] - start, 0.5 * (alone[1][name] - start), rtol=1e-5, atol=1e-7)


def read_moments(run: str, number: int) -> dict[str, torch.Tensor]:
    path = paths.get_runs_folder() / run / f"round-{number:04d}.safetensors"
    return checkpoint.read_checkpoint(checkpoint.get_memory_path(path))


def test_moments_of_a_factor_rest_while_the_other_is_trained(home: Path, tmp_path: Path) -> None:
    recipe = words(tmp_path, "merge=[mean, fedavgm]", "train.techniques=[{lora: {rank: 2}}]")
    execute(recipe, run="factors")
    first, second = read_moments("factors", 1), read_moments("factors", 2)
    new = {name for name in second if name not in first}
    stayed = {name for name in first if torch.equal(first[name], second[name])}
    assert new, "the other factor has moments from its first round on"
    assert stayed
    assert {"lora_A" in name for name in stayed} != {"lora_A" in name for name in new}


@pytest.mark.parametrize(
    ("merge", "techniques", "reason"),
    [
        ("[fedadam, mean]", "full", "in the order"),
        ("[mean, fedadam, fedavgm]", "full", "both take the last step"),
        ("[fedex-lora, fedadam]", "[{lora: {trained_factors: both-and-base}}]", "fedex-lora rewrites the base"),
        ("[flexlora, fedyogi]", "[{lora: {trained_factors: both}}]", "flexlora factors the merged product anew"),
        ("[mean, fedadam]", "compact", "compact, which trains another random subspace"),
        ("[mean, fedadam]", "dynamic-pruning", "dynamic-pruning, which moves the active weights"),
        ("[mean, {fedadam: {tau: 0}}]", "full", "tau"),
        ("[mean, {fedavgm: {lr: .inf}}]", "full", "lr"),
        ("[mean, {fedadam: {beta2: 1}}]", "full", "beta2"),
    ],
)
def test_what_moments_do_not_fit_is_refused(merge: str, techniques: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        trivial(f"merge={merge}", f"train.techniques={techniques}")


def test_a_single_merge_takes_no_server_optimiser() -> None:
    config = MergeConfig.model_validate({"models": [{"model": "a"}], "base_model": "a", "relax": ["fedadam"]})
    with pytest.raises(RecipeError, match="acts over the rounds"):
        build_steps(config)


def test_fedit_and_a_server_optimiser_fit() -> None:
    assert build_pipeline([Unit(name="fedit"), Unit(name="fedadam")]).server_optimiser == make_step("fedadam", {})
