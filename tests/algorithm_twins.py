"""The algorithms in a few lines of NumPy each, on clients whose losses are convex. They share no code with the package.

State, gradients and updates are vectors. ``gradients[i]`` is the gradient of client i's loss.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "Clients", "Twin", "make_quadratics", "run_twin"]

Array = NDArray[np.float64]
Twin = Callable[["Clients", Mapping[str, Any]], Array]


@dataclass(frozen=True)
class Clients:
    """What the clients of a run have: losses, gradients, examples, steps, and who takes part in each round."""

    losses: Sequence[Callable[[Array], float]]
    gradients: Sequence[Callable[[Array], Array]]
    examples: Sequence[int]
    steps: Sequence[int]
    cohorts: Sequence[Sequence[int]]
    start: Array
    lr: float
    momentum: float = 0.0
    arrays: Mapping[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return len(self.gradients)


def make_quadratics(
    seed: int,
    cohorts: Sequence[Sequence[int]],
    *,
    steps: Sequence[int],
    lr: float,
    momentum: float = 0.0,
    curvature: float = 0.3,
) -> Clients:
    """1/2 (w - b)^T A (w - b) with another A and b for each client; no eigenvalue of an A is below ``curvature``."""
    draw = np.random.default_rng(seed)
    count, width = len(steps), 5
    roots = draw.normal(size=(count, width, width))
    matrices = roots @ roots.transpose(0, 2, 1) / width + curvature * np.eye(width)
    centres = 2 * draw.normal(size=(count, width))

    def make_loss(matrix: Array, centre: Array) -> Callable[[Array], float]:
        return lambda w: float(0.5 * (w - centre) @ matrix @ (w - centre))

    def make_gradient(matrix: Array, centre: Array) -> Callable[[Array], Array]:
        return lambda w: np.asarray(matrix @ (w - centre))

    pairs = list(zip(matrices, centres, strict=True))
    return Clients(
        [make_loss(*pair) for pair in pairs],
        [make_gradient(*pair) for pair in pairs],
        [10 * (place + 1) for place in range(count)],
        steps,
        cohorts,
        np.zeros(width),
        lr,
        momentum,
        {"matrices": matrices, "centres": centres},
    )


def descend(clients: Clients, client: int, start: Array, change: Callable[[Array, Array], Array]) -> Array:
    """Local SGD, whose gradients ``change(w, gradient)`` corrects."""
    own, velocity = start.copy(), np.zeros_like(start)
    for _ in range(clients.steps[client]):
        velocity = clients.momentum * velocity + change(own, clients.gradients[client](own))
        own = own - clients.lr * velocity
    return own


def twin_of_fedavg(clients: Clients, settings: Mapping[str, Any]) -> Array:
    state = clients.start
    for cohort in clients.cohorts:
        total = sum(clients.examples[one] for one in cohort)
        ends = [descend(clients, one, state, lambda w, g: g) * clients.examples[one] / total for one in cohort]
        state = np.sum(ends, axis=0)
    return state


def twin_of_fedprox(clients: Clients, settings: Mapping[str, Any]) -> Array:
    state = clients.start
    for cohort in clients.cohorts:
        total = sum(clients.examples[one] for one in cohort)

        def pull(w: Array, g: Array, centre: Array = state) -> Array:
            return np.asarray(g + settings["mu"] * (w - centre))

        state = np.sum([descend(clients, one, state, pull) * clients.examples[one] / total for one in cohort], axis=0)
    return state


def twin_of_scaffold(clients: Clients, settings: Mapping[str, Any]) -> Array:
    state, common = clients.start, np.zeros_like(clients.start)
    own = np.zeros((clients.count, len(state)))
    for cohort in clients.cohorts:
        ends, changes = [], []
        for one in cohort:

            def correct(w: Array, g: Array, change: Array = common - own[one]) -> Array:
                return g + change

            end = descend(clients, one, state, correct)
            if settings["option"] == 1:
                new = clients.gradients[one](state)
            else:
                new = own[one] - common + (state - end) / (clients.steps[one] * clients.lr)
            ends.append(end)
            changes.append(new - own[one])
        for one, change in zip(cohort, changes, strict=True):
            own[one] += change
        state = np.mean(ends, axis=0)
        common = common + len(cohort) / clients.count * np.mean(changes, axis=0)
    return state


def twin_of_feddyn(clients: Clients, settings: Mapping[str, Any]) -> Array:
    alpha = settings["alpha"]
    state, h = clients.start, np.zeros_like(clients.start)
    own = np.zeros((clients.count, len(state)))
    for cohort in clients.cohorts:
        ends = []
        for one in cohort:

            def tilt(w: Array, g: Array, one: int = one, centre: Array = state) -> Array:
                return np.asarray(g - own[one] + alpha * (w - centre))

            end = descend(clients, one, state, tilt)
            own[one] -= alpha * (end - state)
            ends.append(end)
        h = h - alpha / clients.count * np.sum([end - state for end in ends], axis=0)
        state = np.mean(ends, axis=0) - h / alpha
    return state


def twin_of_fednova(clients: Clients, settings: Mapping[str, Any]) -> Array:
    rho, state = clients.momentum, clients.start
    norms = [sum((1 - rho ** (k + 1)) / (1 - rho) for k in range(steps)) for steps in clients.steps]
    for cohort in clients.cohorts:
        total = sum(clients.examples[one] for one in cohort)
        shares = {one: clients.examples[one] / total for one in cohort}
        effective = sum(shares[one] * norms[one] for one in cohort)
        moves = [shares[one] * (descend(clients, one, state, lambda w, g: g) - state) / norms[one] for one in cohort]
        state = state + effective * np.sum(moves, axis=0)
    return state


def twin_of_q_fedavg(clients: Clients, settings: Mapping[str, Any]) -> Array:
    q, lipschitz, state = settings["q"], 1 / clients.lr, clients.start
    for cohort in clients.cohorts:
        tops, bottoms = [], []
        for one in cohort:
            loss = clients.losses[one](state)
            gradient = lipschitz * (state - descend(clients, one, state, lambda w, g: g))
            tops.append(loss**q * gradient)
            bottoms.append(q * loss ** (q - 1) * gradient @ gradient + lipschitz * loss**q)
        state = state - np.sum(tops, axis=0) / np.sum(bottoms)
    return state


_TWINS: Mapping[str, Twin] = {
    "fedavg": twin_of_fedavg,
    "fedprox": twin_of_fedprox,
    "scaffold": twin_of_scaffold,
    "feddyn": twin_of_feddyn,
    "fednova": twin_of_fednova,
    "q-fedavg": twin_of_q_fedavg,
}


def run_twin(name: str, clients: Clients, settings: Mapping[str, Any]) -> Array:
    """The state after all rounds."""
    return _TWINS[name](clients, settings)
