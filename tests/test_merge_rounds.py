"""Combining steps in a federated round: robust ones, too few clients, batch-norm statistics, weights by examples."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedtune.errors import RecipeError
from fedtune.merging import MergeContext, bind_combine, build_pipeline, merge_client_updates
from fedtune.recipe.schema import Unit
from tests.merge_examples import METHODS, models, operands, reference, thinning
from tests.merge_examples import SHAPES as MODEL_SHAPES
from tests.test_merging import SHAPES, a_state, spool

EXAMPLES = [10, 20, 30, 25, 15, 12, 18]


ROBUST = ("median", "krum", "multi-krum", "bulyan", "centred-clipping", "fltrust")


def after_round(
    folder: Path, name: str, deltas: list[dict[str, Tensor]], draw: int = 1, **settings: Any
) -> dict[str, Tensor]:
    pipeline = build_pipeline([Unit(name=name, settings=settings)])
    sent = [spool(folder, client, EXAMPLES[client], delta) for client, delta in enumerate(deltas)]
    state = {tensor: torch.zeros_like(value) for tensor, value in deltas[0].items()}
    context = MergeContext(round_number=draw, reference=deltas[0] if name == "fltrust" else {})
    return merge_client_updates(pipeline, state, state, sent, context)


def clients(count: int) -> list[dict[str, Tensor]]:
    common = a_state(seed=99)
    return [{name: common[name] + 0.3 * value for name, value in a_state(seed=seed).items()} for seed in range(count)]


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((one[name] - other[name]).norm()) ** 2 for name in one))


@pytest.mark.parametrize(
    ("name", "settings"),
    [("geometric-median", {}), ("geometric-median", {"distances": "tensor"}), ("trimmed-mean", {"share": 0.2})],
)
def test_one_client_of_five_that_sends_a_hundredfold_delta_moves_a_robust_merge_little(
    tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    honest = clients(5)
    hostile = [*honest[:4], {tensor: -100 * value for tensor, value in honest[4].items()}]
    others = after_round(tmp_path, "mean", honest[:4])
    size = distance(others, {tensor: torch.zeros_like(value) for tensor, value in others.items()})
    assert distance(after_round(tmp_path, name, hostile, **settings), others) < 0.2 * size
    assert distance(after_round(tmp_path, "mean", hostile), others) > 5 * size


@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if name not in ("fisher", "regmean", "lorm")]
)
def test_every_step_serves_a_round(tmp_path: Path, name: str) -> None:
    count = METHODS[name].models
    found = after_round(tmp_path, name, clients(count), **METHODS[name].full or METHODS[name].plain)
    assert all(bool(value.isfinite().all()) for value in found.values())
    assert float(found["weight"].norm()) > 0


@pytest.mark.parametrize(
    ("name", "count", "sentence"),
    [
        ("slerp", 3, "^merge: slerp takes 2 models, but 3 came; leave some out or choose mean$"),
        ("nuslerp", 1, "^merge: nuslerp needs at least 2 models, but 1 came; add some or choose mean$"),
        ("model-stock", 1, "^merge: model-stock needs at least 2 models, but 1 came; add some or choose mean$"),
        ("sce", 1, "^merge: sce needs at least 2 models, but 1 came; add some or choose mean$"),
        (
            "trimmed-mean",
            4,
            "^merge: trimmed-mean with trim_fraction 0.2 needs at least 5 models to remove one at each end",
        ),
        ("fisher", 2, "^merge: fisher needs statistics of every model, but model 1 has none"),
    ],
)
def test_too_few_or_too_many_clients_are_refused(tmp_path: Path, name: str, count: int, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        after_round(tmp_path, name, clients(count))


@pytest.mark.parametrize("name", METHODS)
def test_weights_of_a_round_sum_to_one(name: str) -> None:
    combine = build_pipeline([Unit(name=name)]).combine
    equal = name in ("model-stock", "sce", "magmax", "opcm", "trimmed-mean", *ROBUST)
    assert combine.compute_client_weights([1, 3]) == ([0.5, 0.5] if equal else [0.25, 0.75])


def test_each_round_draws_masks_of_its_own_and_a_round_again_draws_the_same(tmp_path: Path) -> None:
    first, second, again = (after_round(tmp_path, "dare-linear", clients(3), draw=draw) for draw in (1, 2, 1))
    assert torch.equal(first["weight"], again["weight"])
    assert not torch.equal(first["weight"], second["weight"])


NORM: dict[str, tuple[int, ...]] = {"n.weight": (4,), "n.running_mean": (4,), "n.running_var": (4,)}


@pytest.mark.parametrize("name", ["ties", "dare-linear", "sce", "magmax", "opcm", "breadcrumbs"])
def test_running_statistics_are_no_task_vectors(tmp_path: Path, name: str) -> None:
    deltas = [a_state(NORM, seed) for seed in (1, 2, 3)]
    found, mean = after_round(tmp_path, name, deltas), after_round(tmp_path, "mean", deltas)
    assert not torch.allclose(found["n.weight"], mean["n.weight"])
    if name in ("sce", "magmax", "opcm"):  # models count the same there
        return
    for running in ("n.running_mean", "n.running_var"):
        torch.testing.assert_close(found[running], mean[running])


@pytest.mark.parametrize(
    ("name", "settings"),
    [("trimmed-mean", {}), ("geometric-median", {"distances": "model"}), ("geometric-median", {"distances": "tensor"})],
)
def test_a_robust_merge_does_not_pool_the_spread_of_means_that_a_hostile_client_made(
    tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    """Honest clients differ, as only then the median leaves a hostile one a share that its squared mean multiplies."""
    common = a_state(NORM, 1)
    honest = [{key: common[key] + 0.1 * value for key, value in a_state(NORM, 10 + k).items()} for k in range(4)]
    deltas = [*honest, {key: 1000 * value for key, value in common.items()}]
    found = after_round(tmp_path, name, deltas, **settings)["n.running_var"]
    torch.testing.assert_close(found, common["n.running_var"], rtol=0.2, atol=0.2)
    assert float(after_round(tmp_path, "mean", deltas)["n.running_var"].max()) > 1000


@pytest.mark.parametrize("name", METHODS)
def test_a_settled_step_treats_running_statistics_as_the_chosen_one_does(name: str) -> None:
    step = thinning(name)
    settled = bind_combine(
        step,
        MODEL_SHAPES,
        operands(step, models(METHODS[name].models), [0.5] * METHODS[name].models),
        MergeContext(reference=reference(step)),
    )
    assert settled.combine.sparsifies == step.sparsifies


def test_shapes_of_the_round_are_all_covered(tmp_path: Path) -> None:
    assert after_round(tmp_path, "ties", clients(3)).keys() == SHAPES.keys()
