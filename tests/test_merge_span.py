"""Merges in coefficient space against readable twins that work on the vectors themselves."""

import pytest
import torch
from torch import Tensor

from fedtune.merging import MergeContext, bind_combine
from fedtune.merging.combine.linear_combinations.geometric_median import GeometricMedian
from fedtune.merging.combine.linear_combinations.karcher import Karcher
from fedtune.merging.combine.linear_combinations.model_stock import ModelStock
from fedtune.merging.combine.linear_combinations.multislerp import MultiSlerp
from fedtune.merging.combine.linear_combinations.nuslerp import NuSlerp
from fedtune.merging.combine.linear_combinations.slerp import Slerp
from tests.merge_examples import SHAPES, a_model, merged, models, operands

WEIGHTS = [0.4, 0.35, 0.25]
"""None is half of all, which would make its model the median."""
LARGE = [name for name in SHAPES if name not in ("scalar", "none")]


def vectors(name: str, count: int = 3) -> list[Tensor]:
    return [model[name].double().flatten() for model in models(count)]


def arc(a: Tensor, b: Tensor, t: float) -> Tensor:
    """SLERP of two vectors."""
    angle = torch.dot(a / a.norm(), b / b.norm()).acos()
    point: Tensor = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()
    return point


def towards(u: Tensor, directions: list[Tensor]) -> Tensor:
    """exp_u of the weighted mean of the logarithms at u."""
    tangent = torch.zeros_like(u)
    for weight, x in zip(WEIGHTS, directions, strict=True):
        cosine = torch.dot(u, x)
        tangent += weight * cosine.acos() * (x - cosine * u) / (x - cosine * u).norm()
    point: Tensor = u * tangent.norm().cos() + tangent / tangent.norm() * tangent.norm().sin()
    return point


def barycentre(given: list[Tensor], steps: int) -> Tensor:
    directions = [x / x.norm() for x in given]
    u = sum((w * x for w, x in zip(WEIGHTS, directions, strict=True)), torch.zeros_like(given[0]))
    u = u / u.norm()
    for _ in range(steps):
        u = towards(u, directions)
    return u * sum(w * float(x.norm()) for w, x in zip(WEIGHTS, given, strict=True))


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found.double().flatten(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_slerp_is_the_twin(name: str, t: float) -> None:
    a, b = vectors(name, 2)
    assert_close(merged(Slerp(t=t), models(2))[name], arc(a, b, t))


def test_slerp_at_its_ends_is_the_models() -> None:
    for t, model in ((0.0, a_model(0)), (1.0, a_model(1))):
        found = merged(Slerp(t=t), models(2))
        assert all(torch.equal(found[name], model[name]) for name in SHAPES)


def test_slerp_keeps_the_norm_of_models_of_equal_norm_and_the_mean_does_not() -> None:
    a, b = (model["weight"] / model["weight"].norm() for model in models(2))
    norms = [float(merged(Slerp(t=t), [{"w": a}, {"w": b}])["w"].norm()) for t in (0.1, 0.5, 0.8)]
    assert norms == pytest.approx([1.0] * 3, abs=1e-6)
    assert float(((a + b) / 2).norm()) < 0.95


@pytest.mark.parametrize("other", [1.0001, -1.0001, 0.0])
def test_slerp_of_parallel_opposite_or_zero_vectors_is_a_straight_line(other: float) -> None:
    a = a_model(0)["weight"]
    b = a * other + 1e-4 * a_model(1)["weight"] * (other != 0)
    found = merged(Slerp(t=0.25), [{"w": a}, {"w": b}])["w"]
    torch.testing.assert_close(found, 0.75 * a + 0.25 * b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("over", ["tensor", "row", "column"])
def test_nuslerp_is_the_twin_group_by_group(over: str) -> None:
    a, b = (model["weight"].double() for model in models(2))
    found = merged(NuSlerp.model_validate({"granularity": over}), models(2), [0.6, 0.2])["weight"]
    if over == "tensor":
        wanted = arc(a.flatten(), b.flatten(), 0.25).reshape(a.shape)
    elif over == "row":
        wanted = torch.stack([arc(x, y, 0.25) for x, y in zip(a, b, strict=True)])
    else:
        wanted = torch.stack([arc(x, y, 0.25) for x, y in zip(a.T, b.T, strict=True)]).T
    assert_close(found, wanted.flatten())


@pytest.mark.parametrize("name", LARGE)
def test_karcher_and_multislerp_are_the_twin(name: str) -> None:
    given = vectors(name)
    assert_close(merged(MultiSlerp(), models(3), WEIGHTS)[name], barycentre(given, 1))
    steps = Karcher(max_iterations=50, tolerance=0.0)
    assert_close(merged(steps, models(3), WEIGHTS)[name], barycentre(given, 50))


def test_the_karcher_mean_stops_when_a_step_is_short() -> None:
    far = merged(Karcher(max_iterations=100, tolerance=0.0), models(3), WEIGHTS)["weight"]
    near = merged(Karcher(max_iterations=100, tolerance=1e-2), models(3), WEIGHTS)["weight"]
    assert 1e-7 < float((far - near).norm() / far.norm()) < 1e-2


def test_opposite_directions_have_no_barycentre_and_fall_back_to_the_mean() -> None:
    a = a_model(0)["weight"]
    for step in (Karcher(), MultiSlerp()):
        found = merged(step, [{"w": a}, {"w": -3 * a}], [0.5, 0.5])["w"]
        torch.testing.assert_close(found, -a, rtol=0, atol=1e-6)


def test_a_model_without_change_counts_in_the_length_but_has_no_direction() -> None:
    a = a_model(0)["weight"]
    found = merged(Karcher(), [{"w": a}, {"w": torch.zeros_like(a)}], [0.5, 0.5])["w"]
    torch.testing.assert_close(found, a / 2, rtol=0, atol=1e-6)


def test_model_stock_takes_the_mean_of_equal_models_and_nothing_of_orthogonal_ones() -> None:
    orthogonal = [{"w": torch.eye(3)[index] * 2} for index in range(3)]
    assert not bool(merged(ModelStock(), orthogonal)["w"].any())
    torch.testing.assert_close(merged(ModelStock(), [a_model(2)] * 3)["weight"], a_model(2)["weight"])


@pytest.mark.parametrize("over", ["tensor", "row"])
def test_model_stock_is_the_twin(over: str) -> None:
    given = [model["weight"].double() for model in models(4)]
    rows = [[x[i : i + 1] for x in given] for i in range(len(given[0]))]
    groups = [[x.flatten()[None] for x in given]] if over == "tensor" else rows
    wanted = []
    for group in groups:
        pairs = [(x, y) for i, x in enumerate(group) for y in group[:i]]
        c = sum(float(torch.cosine_similarity(x, y)) for x, y in pairs) / len(pairs)
        wanted.append(4 * c / (1 + 3 * c) * sum(group, torch.zeros_like(group[0])) / 4)
    found = merged(ModelStock.model_validate({"granularity": over}), models(4))["weight"]
    assert_close(found, torch.cat(wanted).flatten())


def test_model_stock_never_turns_back() -> None:
    away = [{"w": torch.tensor([1.0, 0, 0])}, {"w": torch.tensor([-1.0, 0.1, 0])}, {"w": torch.tensor([0, -1.0, 0.1])}]
    assert not bool(merged(ModelStock(), away)["w"].any())


def summed_distance(point: Tensor, given: list[Tensor]) -> float:
    return sum(w * float((point - x).norm()) for w, x in zip(WEIGHTS, given, strict=True))


def test_the_geometric_median_of_each_tensor_is_nearer_to_all_than_any_other_point() -> None:
    step, random = GeometricMedian(granularity="tensor"), torch.Generator().manual_seed(3)
    for name in LARGE:
        given, found = vectors(name), merged(step, models(3), WEIGHTS)[name].double().flatten()
        least = summed_distance(found, given)
        mean = sum((w * x for w, x in zip(WEIGHTS, given, strict=True)), torch.zeros_like(found))
        others = [mean, *given]
        others += [found + 0.01 * torch.randn(found.shape, generator=random, dtype=torch.float64) for _ in range(20)]
        assert all(summed_distance(other, given) >= least * (1 - 1e-7) for other in others)


def test_distances_of_whole_models_give_one_set_of_coefficients() -> None:
    given = models(3)
    whole = merged(GeometricMedian(), given, WEIGHTS)
    joined = [{"all": torch.cat([tensor.flatten() for tensor in model.values()])} for model in given]
    wanted = merged(GeometricMedian(granularity="tensor"), joined, WEIGHTS)["all"]
    torch.testing.assert_close(torch.cat([tensor.flatten() for tensor in whole.values()]), wanted, rtol=1e-5, atol=1e-6)
    apart = merged(GeometricMedian(granularity="tensor"), given, WEIGHTS)
    assert not torch.allclose(apart["kernel"], whole["kernel"], atol=1e-4)


def test_a_median_of_whole_models_cannot_be_taken_one_tensor_at_a_time_by_mistake() -> None:
    settled = bind_combine(GeometricMedian(), SHAPES, operands(GeometricMedian(), models(3), WEIGHTS), MergeContext())
    assert settled.combine.name == "linear"
    assert sum(one.weight for one in settled.merge_inputs) == pytest.approx(1.0)
