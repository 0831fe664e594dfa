"""Algorithms with personal models in a few lines of NumPy each. They share no code with the package.

Each returns the shared state, and a row for each client: its own tensors or model, and APFL's alpha.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from tests.algorithm_twins import Array, Clients

__all__ = ["PersonalEnd", "run_personal_twin"]


class PersonalEnd(NamedTuple):
    state: Array
    own: Array


def twin_of_fedper(clients: Clients, settings: Mapping[str, Any]) -> PersonalEnd:
    """Both parts of a vector move in each step; the last entries stay with the client."""
    return split_vector(clients, settings["kept"], lambda step, steps: (True, True))


def twin_of_fedrep(clients: Clients, settings: Mapping[str, Any]) -> PersonalEnd:
    """The head moves in the first half of the steps, the body in the other."""

    def choose(step: int, steps: int) -> tuple[bool, bool]:
        in_head = step < max(1, min(steps - 1, round(settings["share"] * steps)))
        return (True, True) if steps == 1 else (not in_head, in_head)

    return split_vector(clients, settings["kept"], choose)


def split_vector(clients: Clients, kept: int, choose: Callable[[int, int], tuple[bool, bool]]) -> PersonalEnd:
    body, heads = clients.start[:-kept], np.tile(clients.start[-kept:], (clients.count, 1))
    for cohort in clients.cohorts:
        total, ends = sum(clients.examples[one] for one in cohort), []
        for one in cohort:
            parts, velocities = [body.copy(), heads[one].copy()], [np.zeros_like(body), np.zeros(kept)]
            for step in range(clients.steps[one]):
                whole = clients.gradients[one](np.concatenate(parts))
                for place, gradient in enumerate((whole[:-kept], whole[-kept:])):
                    if choose(step, clients.steps[one])[place]:
                        velocities[place] = clients.momentum * velocities[place] + gradient
                        parts[place] = parts[place] - clients.lr * velocities[place]
            ends.append(parts[0] * clients.examples[one] / total)
            heads[one] = parts[1]
        body = np.sum(ends, axis=0)
    return PersonalEnd(body, heads)


def twin_of_ditto(clients: Clients, settings: Mapping[str, Any]) -> PersonalEnd:
    lam, state, own = settings["lam"], clients.start, dict[int, Array]()
    for cohort in clients.cohorts:
        total, ends = sum(clients.examples[one] for one in cohort), []
        for one in cohort:
            gradient, w, v = clients.gradients[one], state.copy(), own.get(one, state).copy()
            w_speed, v_speed = np.zeros_like(w), np.zeros_like(v)
            for _ in range(clients.steps[one]):
                w_speed = clients.momentum * w_speed + gradient(w)
                v_speed = clients.momentum * v_speed + gradient(v) + lam * (v - state)
                w, v = w - clients.lr * w_speed, v - clients.lr * v_speed
            own[one] = v
            ends.append(w * clients.examples[one] / total)
        state = np.sum(ends, axis=0)
    return PersonalEnd(state, np.stack([own[one] for one in range(clients.count)]))


def twin_of_apfl(clients: Clients, settings: Mapping[str, Any]) -> PersonalEnd:
    state, own, alphas = clients.start, dict[int, Array](), [settings["alpha"]] * clients.count
    for cohort in clients.cohorts:
        total, ends = sum(clients.examples[one] for one in cohort), []
        for one in cohort:
            w, v, a = state.copy(), own.get(one, state).copy(), alphas[one]
            w_speed, v_speed = np.zeros_like(w), np.zeros_like(v)
            for _ in range(clients.steps[one]):
                at_mix = clients.gradients[one](a * v + (1 - a) * w)
                slope = float((v - w) @ at_mix)
                w_speed = clients.momentum * w_speed + clients.gradients[one](w)
                v_speed = clients.momentum * v_speed + a * at_mix
                w, v = w - clients.lr * w_speed, v - clients.lr * v_speed
                a = min(1.0, max(0.0, a - clients.lr * slope)) if settings["adaptive"] else a
            own[one], alphas[one] = v, a
            ends.append(w * clients.examples[one] / total)
        state = np.sum(ends, axis=0)
    return PersonalEnd(state, np.stack([np.append(own[one], alphas[one]) for one in range(clients.count)]))


_TWINS: Mapping[str, Callable[[Clients, Mapping[str, Any]], PersonalEnd]] = {
    "fedper": twin_of_fedper,
    "fedrep": twin_of_fedrep,
    "ditto": twin_of_ditto,
    "apfl": twin_of_apfl,
}


def run_personal_twin(name: str, clients: Clients, settings: Mapping[str, Any]) -> PersonalEnd:
    """The state and what the clients keep after all rounds."""
    return _TWINS[name](clients, settings)
