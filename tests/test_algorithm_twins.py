"""Each algorithm equals its twin in NumPy over twenty rounds, in double precision, with clients that come and go."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fedtune.algorithms import Algorithm, AlgorithmSetup, MergedUpdates, find_algorithm
from fedtune.merging import build_pipeline
from fedtune.recipe.schema import Recipe, Unit
from fedtune.server.algorithm_merge import scale_updates
from fedtune.training.optimisers import make_optimiser
from fedtune.wire.client_update import ClientUpdate
from tests.algorithm_twins import Array, Clients, make_quadratics, run_twin
from tests.tiny import a_training_recipe

COHORTS = [[0, 1, 2, 3] if number % 4 == 0 else sorted({number % 4, (number * 3 + 1) % 4, 2}) for number in range(20)]
Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
Stored = dict[int, Mapping[str, Tensor]]


class Rows:
    """One batch of a client, which all of its rows belong to."""

    domains = lengths = None

    def __init__(self, batch: Mapping[str, Tensor]) -> None:
        self.batch = dict(batch)

    def __len__(self) -> int:
        return len(self.batch["labels"])

    def make_batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return {name: one[list(indices)] for name, one in self.batch.items()}


class Federation:
    """Clients that train with the package's algorithm and optimiser, and a server that takes the mean, all in fp64."""

    def __init__(self, recipe: Recipe, folder: Path, model: nn.Module, losses: Sequence[Loss]) -> None:
        self.recipe, self.folder, self.model, self.losses = recipe, folder, model.double(), losses
        found = find_algorithm(recipe)
        assert found is not None
        self.algorithm: Algorithm = found
        start = {name: one.detach().clone() for name, one in model.named_parameters()}
        kept = found.select_kept(model, list(start), ())
        self.kept = [{name: start[name] for name in kept} for _ in losses]
        self.state = {name: one for name, one in start.items() if name not in self.kept[0]}
        self.stored: Stored = {}
        self.memory: Mapping[str, Tensor] = {}

    def run_round(self, cohort: Sequence[int], clients: Clients, batches: Sequence[Mapping[str, Tensor]]) -> None:
        shapes = {name: tuple(one.shape) for name, one in self.state.items()}
        updates = [self.train(one, clients, batches[one]) for one in cohort]
        pipeline = build_pipeline([Unit(name="mean")])
        updates = scale_updates(self.recipe, pipeline, updates, shapes)
        weights = pipeline.combine.compute_client_weights([one.num_examples for one in updates])
        after = {name: one.clone() for name, one in self.state.items()}
        for update, weight in zip(updates, weights, strict=True):
            for name in after:
                after[name] += weight * update.read_rows(name, 0, len(after[name]))
        merged = MergedUpdates(self.state, after, shapes, updates, self.memory, clients.count)
        self.state, self.memory = map(dict, self.algorithm.after_merge(merged))

    def train(self, client: int, clients: Clients, batch: Mapping[str, Tensor]) -> ClientUpdate:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_({**self.state, **self.kept[client]}[name])
        every, loss = dict(self.model.named_parameters()), self.losses[client]
        parameters = {name: every[name] for name in self.state}
        names = self.algorithm.list_sent_memory(self.memory, list(parameters))
        current = self.algorithm.begin_round(
            AlgorithmSetup(
                model=self.model,
                recipe=self.recipe,
                parameters=parameters,
                examples=Rows(batch),
                rows=np.arange(len(batch["labels"])),
                batch_size=4,
                run_forward=lambda batch: (loss(self.model, batch), None),
                stored=self.stored.get(client, {}),
                received={name: self.memory[name] for name in names},
                kept={name: every[name] for name in self.kept[client]},
                make_optimiser=partial(make_optimiser, self.recipe.train),
            )
        )
        optimiser = make_optimiser(self.recipe.train, list(every.values()))
        with current.change_model():
            for step in range(clients.steps[client]):
                if current.personal is not None:
                    with current.personal.use_values():
                        loss(self.model, batch).backward()
                        current.personal.take_step(clients.lr)
                        self.model.zero_grad()
                current.begin_step(step, clients.steps[client])
                terms = [loss(self.model, batch), *current.compute_batch_terms(batch)]
                torch.stack(terms).sum().backward()
                current.change_gradients()
                optimiser.step(clients.lr)
                self.model.zero_grad()
                current.record_step(clients.lr)
        delta = {name: one.detach() - self.state[name] for name, one in parameters.items()}
        end = current.end_round(delta)
        self.stored[client] = {name: one.clone() for name, one in end.stored.items()}
        self.kept[client] = {name: every[name].detach().clone() for name in self.kept[client]}
        path = self.folder / f"{client}.safetensors"
        save_file({**delta, **{f"{self.algorithm.name}/{name}": one for name, one in end.upload.items()}}, path)
        return ClientUpdate(client, clients.examples[client], path)


class Point(nn.Module):
    """A parameter vector."""

    def __init__(self, start: Array) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.from_numpy(start).clone())


def make_recipe(name: str, settings: Mapping[str, Any], clients: Clients) -> Recipe:
    recipe = a_training_recipe(optimiser="sgd", lr=clients.lr, momentum=clients.momentum, batch_size=4)
    unit = Unit(name=name, settings=dict(settings))
    return recipe.model_copy(update={"federation": recipe.federation.model_copy(update={"algorithm": unit})})


def make_quadratic_loss(clients: Clients, client: int) -> Loss:
    matrix, centre = (torch.from_numpy(clients.arrays[name][client]) for name in ("matrices", "centres"))

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        away = model.w - centre  # type: ignore[operator]
        return torch.as_tensor(0.5 * away @ matrix @ away)

    return loss


def run_ours(name: str, settings: Mapping[str, Any], clients: Clients, folder: Path) -> Array:
    losses = [make_quadratic_loss(clients, one) for one in range(clients.count)]
    federation = Federation(make_recipe(name, settings, clients), folder, Point(clients.start), losses)
    batches = [{"labels": torch.zeros(10, dtype=torch.int64)}] * clients.count  # more than one batch of four
    for cohort in clients.cohorts:
        federation.run_round(cohort, clients, batches)
    return np.asarray(federation.state["w"].numpy())


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "fedprox": ("fedprox", {"mu": 0.3}, {}),
    "scaffold, option 1": ("scaffold", {"option": 1}, {}),
    "scaffold, option 2": ("scaffold", {"option": 2}, {}),
    "feddyn": ("feddyn", {"alpha": 0.7}, {}),
    "fednova": ("fednova", {}, {}),
    "fednova with momentum": ("fednova", {}, {"momentum": 0.6}),
    "q-fedavg": ("q-fedavg", {"q": 0.8}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_algorithm_equals_its_twin_on_quadratics_that_differ(tmp_path: Path, case: str) -> None:
    name, settings, more = CASES[case]
    clients = make_quadratics(3, COHORTS, steps=[2, 5, 3, 7], lr=0.05, **more)
    ours, expected = run_ours(name, settings, clients, tmp_path), run_twin(name, clients, settings)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-10)
    assert np.abs(expected - run_twin("fedavg", clients, {})).max() > 1e-3, "the twin differs from FedAvg"


@pytest.mark.parametrize(
    ("name", "settings"), [("scaffold", {}), ("scaffold", {"option": 1}), ("feddyn", {"alpha": 1.0})]
)
def test_it_reaches_the_optimum_that_fedavg_misses(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    clients = make_quadratics(5, [[0, 1, 2, 3]] * 30, steps=[8] * 4, lr=0.1, curvature=1.0)
    clients = Clients(**{**vars(clients), "examples": [1] * 4})
    matrices, centres = clients.arrays["matrices"], clients.arrays["centres"]
    optimum = np.linalg.solve(matrices.sum(0), np.einsum("kij,kj->i", matrices, centres))
    missed = np.linalg.norm(run_twin("fedavg", clients, {}) - optimum)
    assert missed > 0.05
    assert np.linalg.norm(run_ours(name, settings, clients, tmp_path) - optimum) < missed / 100


class Encoder(nn.Module):
    """A linear representation below a linear head."""

    def __init__(self, features: Array, head: Array) -> None:
        super().__init__()
        self.features, self.head = (
            nn.Linear(one.shape[1], one.shape[0], bias=False, dtype=torch.float64) for one in (features, head)
        )
        with torch.no_grad():
            self.features.weight.copy_(torch.from_numpy(features))
            self.head.weight.copy_(torch.from_numpy(head))

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.features(x)))


def square_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return torch.as_tensor(0.5 * (model(batch["x"]) - batch["labels"]).square().sum(1).mean())


def contrast_gradient(z: Array, received: Array, earlier: Array, temperature: float) -> Array:
    """The gradient of the mean contrast with respect to each z, by hand."""

    def cosine(z: Array, other: Array) -> tuple[Array, Array]:
        size = np.linalg.norm(z, axis=1, keepdims=True)
        unit = other / np.linalg.norm(other, axis=1, keepdims=True)
        value = (z * unit).sum(1, keepdims=True) / size
        return value, (unit - value * z / size) / size

    (near, near_slope), (far, far_slope) = cosine(z, received), cosine(z, earlier)
    share = 1 / (1 + np.exp((near - far) / temperature))
    return np.asarray(share * (far_slope - near_slope) / temperature / len(z))


def test_moon_equals_its_twin(tmp_path: Path) -> None:
    draw = np.random.default_rng(11)
    xs, ys = draw.normal(size=(3, 6, 4)), draw.normal(size=(3, 6, 2))
    features, head = draw.normal(size=(3, 4)), draw.normal(size=(2, 3))
    mu, temperature, lr, steps = 0.8, 0.5, 0.05, 4
    cohorts = [[0, 1, 2] if number % 2 else [0, 2] for number in range(20)]
    clients = Clients([], [np.zeros_like] * 3, [6] * 3, [steps] * 3, cohorts, np.zeros(1), lr)
    recipe = make_recipe("moon", {"mu": mu, "temperature": temperature}, clients)
    ours = Federation(recipe, tmp_path, Encoder(features, head), [square_loss] * 3)
    batches = [{"x": torch.from_numpy(x), "labels": torch.from_numpy(y)} for x, y in zip(xs, ys, strict=True)]
    earlier: dict[int, Array] = {}
    for cohort in cohorts:
        ours.run_round(cohort, clients, batches)
        ends = []
        for one in cohort:
            w, v, x, y = features.copy(), head.copy(), xs[one], ys[one]
            for _ in range(steps):
                z = x @ w.T
                residual = (z @ v.T - y) / len(x)
                slope = residual @ v
                if one in earlier:
                    slope = slope + mu * contrast_gradient(z, x @ features.T, x @ earlier[one].T, temperature)
                w, v = w - lr * slope.T @ x, v - lr * residual.T @ z
            earlier[one] = w
            ends.append((w, v))
        features, head = (np.mean([end[part] for end in ends], axis=0) for part in (0, 1))
    np.testing.assert_allclose(ours.state["features.weight"].numpy(), features, rtol=0, atol=1e-10)
    np.testing.assert_allclose(ours.state["head.weight"].numpy(), head, rtol=0, atol=1e-10)


class Softmax(nn.Module):
    """Logistic regression for several classes."""

    def __init__(self, start: Array) -> None:
        super().__init__()
        self.head = nn.Linear(start.shape[1], start.shape[0], bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(start))

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(x))


def test_fedlc_equals_its_twin_also_for_classes_that_a_client_lacks(tmp_path: Path) -> None:
    draw = np.random.default_rng(12)
    xs, state, tau, lr = draw.normal(size=(2, 9, 4)), draw.normal(size=(3, 4)), 0.7, 0.1
    labels = np.array([[0, 0, 0, 0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 2, 2, 2, 2, 0]])
    cohorts = [[0, 1]] * 20
    clients = Clients([], [np.zeros_like] * 2, [9] * 2, [3] * 2, cohorts, np.zeros(1), lr)

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch["x"]), batch["labels"])

    ours = Federation(make_recipe("fedlc", {"tau": tau}, clients), tmp_path, Softmax(state), [loss] * 2)
    batches = [{"x": torch.from_numpy(x), "labels": torch.from_numpy(y)} for x, y in zip(xs, labels, strict=True)]
    for cohort in cohorts:
        ours.run_round(cohort, clients, batches)
        ends = []
        for one in cohort:
            w, x, y = state.copy(), xs[one], labels[one]
            counts = np.maximum(np.bincount(y, minlength=3), 1e-8)
            for _ in range(3):
                logits = x @ w.T - tau * counts**-0.25
                shares = np.exp(logits - logits.max(1, keepdims=True))
                shares = shares / shares.sum(1, keepdims=True)
                w = w - lr * (shares - np.eye(3)[y]).T @ x / len(x)
            ends.append(w)
        state = np.mean(ends, axis=0)
    np.testing.assert_allclose(ours.state["head.weight"].numpy(), state, rtol=0, atol=1e-10)
