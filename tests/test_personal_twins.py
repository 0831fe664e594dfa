"""Each algorithm with personal models equals its twin in NumPy, in double precision, with clients that come and go."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedtune.algorithms.fedrep import count_head_steps
from tests.algorithm_twins import Array, Clients, make_quadratics, run_twin
from tests.personal_twins import PersonalEnd, run_personal_twin
from tests.test_algorithm_twins import COHORTS, Federation, Loss, Point, make_quadratic_loss, make_recipe

KEPT = 2


class Parts(nn.Module):
    """A parameter vector in two parts."""

    def __init__(self, start: Array) -> None:
        super().__init__()
        self.body, self.head = (nn.Parameter(torch.from_numpy(one).clone()) for one in (start[:-KEPT], start[-KEPT:]))


def make_split_loss(clients: Clients, client: int) -> Loss:
    whole = make_quadratic_loss(clients, client)

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        point = nn.Module()
        vars(point)["w"] = torch.cat([model.body, model.head])  # type: ignore[list-item]
        return whole(point, batch)

    return loss


def run_ours(name: str, settings: Mapping[str, Any], clients: Clients, folder: Path, *, split: bool) -> Federation:
    make_loss, model = (make_split_loss, Parts) if split else (make_quadratic_loss, Point)
    losses = [make_loss(clients, one) for one in range(clients.count)]
    federation = Federation(make_recipe(name, settings, clients), folder, model(clients.start), losses)
    batches = [{"labels": torch.zeros(10, dtype=torch.int64)}] * clients.count
    for cohort in clients.cohorts:
        federation.run_round(cohort, clients, batches)
    return federation


def read_end(federation: Federation) -> PersonalEnd:
    """The shared state, and per client its own tensors, and alpha where it has one."""
    [state] = federation.state.values()
    if federation.kept[0]:
        return PersonalEnd(state.numpy(), np.stack([one["head"].numpy() for one in federation.kept]))
    rows = [federation.stored[client] for client in range(4)]
    own = [torch.cat([row["own/w"], *([row["alpha"]] if "alpha" in row else [])]).detach().numpy() for row in rows]
    return PersonalEnd(state.numpy(), np.stack(own))


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "fedper": ("fedper", {"keep": "hea?"}, {"kept": KEPT}, {}),
    "fedper with momentum": ("fedper", {"keep": ["hea?"]}, {"kept": KEPT}, {"momentum": 0.5}),
    "fedrep": ("fedrep", {"keep": "hea?"}, {"kept": KEPT, "share": 0.5}, {}),
    "fedrep, head long": ("fedrep", {"keep": "hea?", "head_share": 0.9}, {"kept": KEPT, "share": 0.9}, {}),
    "fedrep with momentum": ("fedrep", {"keep": "hea?"}, {"kept": KEPT, "share": 0.5}, {"momentum": 0.5}),
    "ditto": ("ditto", {"lam": 0.4}, {"lam": 0.4}, {}),
    "ditto with momentum": ("ditto", {"lam": 0.4}, {"lam": 0.4}, {"momentum": 0.5}),
    "apfl": ("apfl", {"alpha": 0.3}, {"alpha": 0.3, "adaptive": False}, {}),
    "apfl, adaptive": ("apfl", {"adaptive": True}, {"alpha": 0.5, "adaptive": True}, {"lr": 0.005}),
}


@pytest.mark.parametrize("case", CASES)
def test_shared_and_own_values_equal_the_twin_on_quadratics_that_differ(tmp_path: Path, case: str) -> None:
    name, settings, of_twin, more = CASES[case]
    clients = make_quadratics(3, COHORTS, steps=[2, 5, 1, 7], **{"lr": 0.05, **more})
    ours = read_end(run_ours(name, settings, clients, tmp_path, split=name in ("fedper", "fedrep")))
    expected = run_personal_twin(name, clients, of_twin)
    np.testing.assert_allclose(ours.state, expected.state, rtol=0, atol=1e-10)
    np.testing.assert_allclose(ours.own, expected.own, rtol=0, atol=1e-10)
    assert np.abs(expected.own[0] - expected.own[1]).max() > 1e-2
    if name in ("ditto", "apfl"):
        np.testing.assert_allclose(ours.state, run_twin("fedavg", clients, {}), rtol=0, atol=1e-10)


def test_alpha_moves_only_when_it_is_adaptive(tmp_path: Path) -> None:
    clients = make_quadratics(3, COHORTS, steps=[2, 5, 1, 7], lr=0.002)
    fixed, adaptive = (
        read_end(run_ours("apfl", {"adaptive": one}, clients, tmp_path, split=False)).own[:, -1]
        for one in (False, True)
    )
    assert fixed.tolist() == [0.5] * 4
    assert len({*adaptive.tolist()}) == 4
    assert adaptive.min() > 0.5, "own models are better here"
    assert adaptive.max() < 1


@pytest.mark.parametrize(("lam", "far"), [(0.0, True), (19.0, False)])
def test_ditto_lies_between_a_model_alone_and_the_shared_one(tmp_path: Path, lam: float, far: bool) -> None:
    """Without a pull it reaches the client's own optimum; with a strong one it stays at the received state."""
    clients = make_quadratics(5, [[0, 1, 2, 3]] * 40, steps=[8] * 4, lr=0.05, curvature=1.0)
    ended = read_end(run_ours("ditto", {"lam": lam}, clients, tmp_path, split=False))
    to_own = np.linalg.norm(ended.own - clients.arrays["centres"], axis=1)
    to_shared = np.linalg.norm(ended.own - ended.state, axis=1)
    assert (to_own < 1e-4).all() == far
    assert (to_shared < 0.3 * np.linalg.norm(clients.arrays["centres"] - ended.state, axis=1)).all() != far


def test_both_phases_of_fedrep_have_a_step() -> None:
    assert [count_head_steps(0.5, steps) for steps in (2, 3, 4, 7)] == [1, 2, 2, 4]
    assert [count_head_steps(share, 10) for share in (0.01, 0.1, 0.99)] == [1, 1, 9]
