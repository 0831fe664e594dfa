"""Robust merges beside NumPy twins of a few lines, which see whole models as vectors: values, ties, attackers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtune.errors import ClientUpdateError, RecipeError
from fedtune.library.method_list import describe_method, list_methods
from fedtune.merging import MergeContext, bind_combine
from fedtune.merging.combine.robust._krum_scores import compute_krum_scores, select_one_by_one
from fedtune.merging.combine.robust._robust_step import compute_square_distances
from fedtune.merging.combine.robust.bulyan import average_near_median
from fedtune.merging.combine.robust.centred_clipping import compute_clipped_coefficients
from fedtune.merging.combine.robust.fltrust import compute_trusted_coefficients
from fedtune.merging.combine.robust.median import compute_median
from tests.merge_examples import SHAPES, Held, a_model, a_step, merged, operands, settled_and_merged

Vectors = NDArray[np.float64]
ROBUST: dict[str, dict[str, Any]] = {
    "median": {},
    "krum": {"f": 1},
    "multi-krum": {"f": 1},
    "bulyan": {"f": 1},
    "centred-clipping": {"radius": 3.0, "iterations": 4},
    "fltrust": {},
}


def drawn(kind: str, count: int = 7, size: int = 23) -> Vectors:
    """Vectors [models, size]: at random, with ties (small whole numbers), or with one hostile one."""
    random = np.random.default_rng(5)
    if kind == "ties":
        return random.integers(-1, 2, (count, 4)).astype(np.float64)
    found = random.normal(size=size) + 0.5 * random.normal(size=(count, size))
    if kind == "attacked":
        found[-1] *= -40
    return found


def krum_scores(x: Vectors, f: int) -> Vectors:
    near = max(1, len(x) - f - 2)
    return np.array(
        [sum(sorted(float(((a - b) ** 2).sum()) for j, b in enumerate(x) if j != i)[:near]) for i, a in enumerate(x)]
    )


def bulyan(x: Vectors, f: int) -> Vectors:
    left, chosen = list(range(len(x))), []
    for _ in range(len(x) - 2 * f):
        chosen.append(left.pop(int(np.argmin(krum_scores(x[left], f)))))
    near = x[sorted(chosen)]
    return near_median(near, len(near) - 2 * f)


def near_median(x: Vectors, count: int) -> Vectors:
    found = []
    for values in x.T:
        middle = np.median(values)
        found.append(np.mean(sorted(values, key=lambda v, m=middle: (abs(v - m), v))[:count]))  # type: ignore[misc]
    return np.array(found)


def clipped(x: Vectors, centre: Vectors, radius: float | None, steps: int) -> Vectors:
    v = centre
    for _ in range(steps):
        apart = np.linalg.norm(x - v, axis=1)
        radius = float(np.median(apart)) if radius is None else radius
        pulled = [(xi - v) * (min(1.0, radius / d) if d else 1.0) for xi, d in zip(x, apart, strict=True)]
        v = v + np.mean(pulled, axis=0)
    return v


def trusted(x: Vectors, root: Vectors) -> Vectors:
    size = np.linalg.norm(root)
    trust = [max(0.0, float(xi @ root / np.linalg.norm(xi) / size)) for xi in x]
    return sum(t * size / np.linalg.norm(xi) * xi for t, xi in zip(trust, x, strict=True)) / sum(trust)  # type: ignore[no-any-return]


def gram(x: Vectors) -> Tensor:
    return torch.from_numpy(x @ x.T)


KINDS = pytest.mark.parametrize("kind", ["random", "attacked", "ties"])


@KINDS
@pytest.mark.parametrize("f", [1, 2])
def test_the_scores_and_the_selection_of_krum_are_those_of_the_twin(kind: str, f: int) -> None:
    x = drawn(kind, 11)
    squares = compute_square_distances(gram(x))
    np.testing.assert_allclose(compute_krum_scores(squares, f).numpy(), krum_scores(x, f), rtol=1e-10, atol=1e-10)
    left, chosen = list(range(11)), []
    for _ in range(11 - 2 * f):
        chosen.append(left.pop(int(np.argmin(krum_scores(x[left], f)))))
    assert select_one_by_one(squares, f, 11 - 2 * f) == sorted(chosen)


@KINDS
@pytest.mark.parametrize("count", [3, 4, 5])
def test_the_mean_near_the_median_is_that_of_the_twin(kind: str, count: int) -> None:
    for models in (count, count + 1, count + 4):
        x = drawn(kind, models)
        found = average_near_median(torch.from_numpy(x), count)
        np.testing.assert_allclose(found.numpy(), near_median(x, count), rtol=1e-10, atol=1e-10)


@KINDS
@pytest.mark.parametrize("count", [1, 4, 7])
def test_the_median_is_that_of_numpy(kind: str, count: int) -> None:
    x = drawn(kind, count)
    found = compute_median(torch.from_numpy(x).sort(dim=0).values)
    np.testing.assert_allclose(found.numpy(), np.median(x, axis=0), rtol=1e-10, atol=1e-10)


@KINDS
@pytest.mark.parametrize("radius", [None, 0.5, 3.0])
def test_the_coefficients_of_clipping_and_of_trust_give_the_twins_vectors(kind: str, radius: float | None) -> None:
    x, centre = drawn(kind), drawn(kind, 8)[7]
    both = np.concatenate([x, centre[None]])
    for steps in (1, 5):
        c = compute_clipped_coefficients(gram(both), radius, steps).numpy()
        np.testing.assert_allclose(c @ both, clipped(x, centre, radius, steps), rtol=1e-9, atol=1e-10)
    lengthy = x[np.linalg.norm(x, axis=1) > 0]
    c = compute_trusted_coefficients(gram(np.concatenate([lengthy, centre[None]]))).numpy()
    np.testing.assert_allclose(c @ lengthy, trusted(lengthy, centre), rtol=1e-10, atol=1e-10)


TWINS: dict[str, Callable[[Vectors, Vectors], Vectors]] = {
    "median": lambda x, _: np.median(x, axis=0),
    "krum": lambda x, _: x[np.argmin(krum_scores(x, 1))],
    "multi-krum": lambda x, _: x[np.argsort(krum_scores(x, 1), kind="stable")[:4]].mean(0),
    "bulyan": lambda x, _: bulyan(x, 1),
    "centred-clipping": lambda x, centre: clipped(x, centre, 3.0, 4),
    "fltrust": trusted,
}


def as_vector(model: dict[str, Tensor]) -> Vectors:
    return np.concatenate([tensor.double().numpy().reshape(-1) for tensor in model.values()])


@pytest.mark.parametrize("attacked", [False, True])
@pytest.mark.parametrize("name", TWINS)
def test_a_merge_tensor_by_tensor_is_the_twin_of_whole_models(name: str, attacked: bool) -> None:
    given, own = [a_model(seed) for seed in range(7)], a_model(77)
    if attacked:
        given[4] = {tensor: -30 * value for tensor, value in given[4].items()}
    step = a_step(name, ROBUST[name])
    bound = bind_combine(step, SHAPES, operands(step, given, [1 / 7] * 7), MergeContext(reference=own))
    found = [
        torch.cat([rows.reshape(-1) for rows in bound.combine.combine(tensor, shape, bound.merge_inputs)])
        for tensor, shape in SHAPES.items()
        if 0 not in shape
    ]
    x = np.stack([as_vector(model) for model in given])
    np.testing.assert_allclose(torch.cat(found).numpy(), TWINS[name](x, as_vector(own)), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in ROBUST if name != "centred-clipping"])
def test_a_hostile_model_of_any_size_moves_the_result_little(name: str) -> None:
    """Two equal sizes of an attack give all but the same result."""
    results = []
    for size in (-1e3, -1e6):
        given = [*(a_model(seed) for seed in range(6)), {key: size * value for key, value in a_model(6).items()}]
        results.append(merged(a_step(name, ROBUST[name]), given))
    for tensor in ("weight", "kernel"):
        torch.testing.assert_close(results[0][tensor], results[1][tensor])


def test_a_clipped_model_moves_the_result_by_its_share_of_the_radius() -> None:
    honest = [a_model(seed) for seed in range(6)]
    step = a_step("centred-clipping", {"radius": 2.0})
    moved = merged(step, [*honest, {key: 1e6 * value for key, value in a_model(6).items()}])
    assert np.linalg.norm(as_vector(moved)) <= 2.0 + 1e-4


@pytest.mark.parametrize(
    ("name", "settings", "count", "needed"),
    [
        ("krum", {"f": 2}, 6, 7),
        ("multi-krum", {"f": 1}, 4, 5),
        ("multi-krum", {"f": 1, "m": 6}, 6, 7),
        ("bulyan", {"f": 1}, 6, 7),
    ],
)
def test_too_few_models_for_the_hostile_ones_are_refused(
    name: str, settings: dict[str, Any], count: int, needed: int
) -> None:
    step = a_step(name, settings)
    assert step.required_models == needed
    merged(step, [a_model(seed) for seed in range(needed)])
    with pytest.raises(RecipeError, match=f"needs at least {needed} models, but {count} were given; lower f or add"):
        merged(step, [a_model(seed) for seed in range(count)])


@pytest.mark.parametrize("name", ROBUST)
def test_values_that_are_not_finite_are_refused(name: str) -> None:
    given = [a_model(seed) for seed in range(7)]
    given[3]["bias"][2] = torch.nan
    with pytest.raises(ClientUpdateError, match=r"not finite; leave (it|this model) out$"):
        merged(a_step(name, ROBUST[name]), given)


def test_fltrust_refuses_models_without_a_root_update_and_updates_that_all_disagree_with_it() -> None:
    step, model = a_step("fltrust", {}), a_model(1)
    given = operands(step, [model], [1.0])
    with pytest.raises(RecipeError, match="update that a server trains in a round, and here is none; choose"):
        bind_combine(step, SHAPES, given, MergeContext())
    against = {key: -value for key, value in model.items()}
    with pytest.raises(ClientUpdateError, match="fltrust trusts no update"):
        bind_combine(step, SHAPES, given, MergeContext(reference=against))


def test_a_tensor_without_a_last_merge_is_clipped_around_zero() -> None:
    """As in the first round in which one factor of a low-rank pair is trained."""
    step, given = a_step("centred-clipping", {"radius": 1.0}), [{"w": torch.ones(4)}, {"w": -torch.ones(4)}]
    shapes = {"w": (4,)}
    around = [
        bind_combine(step, shapes, operands(step, given, [0.5, 0.5]), MergeContext(reference=reference))
        for reference in ({}, {"other": torch.ones(3)})
    ]
    assert around[0].merge_inputs[0].weight == around[1].merge_inputs[0].weight == 0.25
    assert not bool(settled_and_merged(step, operands(step, given, [0.5, 0.5]), shapes)["w"].any())


def test_equal_scores_of_krum_go_to_the_first_client() -> None:
    one, two = Held({"w": torch.tensor([1.0])}), Held({"w": torch.tensor([1.0])})
    far = [Held({"w": torch.tensor([value])}) for value in (30.0, -30.0, 60.0)]
    step = a_step("krum", {})
    bound = bind_combine(step, {"w": (1,)}, operands(step, [far[0], one, two, *far[1:]], [0.2] * 5), MergeContext())
    assert [given.read_rows for given in bound.merge_inputs] == [one]


def test_merges_and_attacks_are_listed_with_their_cards() -> None:
    known = list_methods()
    assert {("merge", name) for name in ROBUST} < set(known)
    attacks = ["a-little-is-enough", "label-flip", "model-replacement", "noise", "sign-flip"]
    assert [name for kind, name in known if kind == "attack"] == attacks
    for kind, name in [*(("merge", name) for name in ROBUST), *(("attack", name) for name in attacks)]:
        card = describe_method(kind, name).card
        assert all(
            part in card for part in ("\nWhat: ", "\nDefaults: ", "\nUse when: ", "\nAvoid when: ", "\nSource: ")
        )
