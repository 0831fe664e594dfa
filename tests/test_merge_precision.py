"""Sums in single precision, beside slow twins in double or in fractions: errors and ties."""

from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from fedtune.merging.combine._weighted_sums import sum_weighted
from fedtune.merging.combine.task_vectors._magnitude_selection import find_threshold
from fedtune.merging.combine.task_vectors._task_vector_step import sum_with_elected_sign
from tests.merge_examples import a_step, merged

UNIT = 2.0**-24
"""The largest relative error of one rounding to fp32."""
WEIGHTS: dict[str, list[float]] = {
    "shares": [0.5, 0.3, 0.2],
    "equal": [1 / 3, 1 / 3, 1 / 3],
    "against": [1.7, -0.9, 0.4],
    "one": [0.0, 1.0, 0.0],
}


def deltas(kind: str, count: int = 3, size: int = 20_000) -> list[Tensor]:
    """What fine-tunes differ from a base [size, 1], fp32: of numbers in that precision, or of those of ``kind``."""
    random = torch.Generator().manual_seed(7)
    base = 0.02 * torch.randn(size, 1, generator=random)
    tuned = [base + 0.002 * torch.randn(size, 1, generator=random) for _ in range(count)]
    dtype = getattr(torch, kind)
    return [one.to(dtype).float() - base.to(dtype).float() for one in tuned]


def sum_of(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The twin: in double precision."""
    return torch.stack([weight * part.double() for part, weight in zip(parts, weights, strict=True)]).sum(0)


def elected(parts: Sequence[Tensor], weights: Sequence[float], normalise: bool) -> Tensor:
    """The twin: each entry in fractions, which round nothing, but for its final quotient."""
    exact = [Fraction(weight) for weight in weights]
    found = []
    for entries in zip(*(part.flatten().tolist() for part in parts), strict=True):
        weighed = [(weight * Fraction(entry), weight) for weight, entry in zip(exact, entries, strict=True)]
        sign = 1 if sum(value for value, _ in weighed) >= 0 else -1
        agreeing = [(value, weight) for value, weight in weighed if value * sign > 0]
        total, divisor = (sum(part, start=Fraction(0)) for part in zip(*agreeing, strict=True)) if agreeing else (0, 1)
        found.append(float(total / divisor) if normalise and abs(divisor) > 1e-8 else float(total))
    return torch.tensor(found, dtype=torch.float64).reshape(parts[0].shape)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_sum_of_few_errs_by_the_rounding_of_its_terms(kind: str, weights: str) -> None:
    parts, given = deltas(kind), WEIGHTS[weights]
    found, wanted = sum_weighted(parts, given), sum_of(parts, given)
    largest = [max(1.0, abs(weight)) if weight else 0.0 for weight in given]
    bound = 4 * UNIT * sum_of([part.abs() for part in parts], largest)
    assert found.dtype == torch.float32
    assert bool(((found - wanted).abs() <= bound).all())
    assert float((found - wanted).norm() / wanted.norm()) < 1e-7


def test_a_sum_of_many_is_that_of_double_precision() -> None:
    parts, weights = deltas("float32", 9), [1 / 9] * 9
    found = sum_weighted(parts, weights)
    torch.testing.assert_close(found, sum_of(parts, weights), rtol=1e-15, atol=1e-18)


@pytest.mark.parametrize("weights", ["shares", "equal"])
def test_in_half_precision_a_sum_differs_only_where_the_exact_one_is_halfway(weights: str) -> None:
    """Models, not deltas: what a linear merge of bf16 models without a base adds up, and rounds to bf16."""
    random = torch.Generator().manual_seed(3)
    parts = [torch.randn(300_000, 1, generator=random).bfloat16().float() for _ in range(3)]
    found, exact = sum_weighted(parts, WEIGHTS[weights]), sum_of(parts, WEIGHTS[weights])
    other = found.bfloat16() != exact.bfloat16()
    halfway = (found.bfloat16()[other].double() + exact.bfloat16()[other].double()) / 2
    spread = sum_of([part.abs() for part in parts], WEIGHTS[weights])[other]
    assert bool(((exact[other] - halfway).abs() <= 4 * UNIT * spread).all())
    assert int(other.sum()) < 0.015 * other.numel()


@pytest.mark.parametrize("weights", [[0.5, 0.5], [1 / 3] * 3, [0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [1 / 7] * 7])
def test_what_is_the_same_in_all_models_stays_as_it_is_to_the_last_bit(weights: list[float]) -> None:
    [one] = deltas("float32", 1)
    assert torch.equal(sum_weighted([one] * len(weights), weights), one)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_an_election_is_that_of_fractions(kind: str, weights: str, normalise: bool) -> None:
    parts, given = deltas(kind, size=4000), WEIGHTS[weights]
    trimmed = [find_threshold(lambda part=part: [part], 2000, len(part)).keep()(part) for part in parts]  # type: ignore[misc]
    found, wanted = sum_with_elected_sign(trimmed, given, normalise), elected(trimmed, given, normalise)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=5 * UNIT, atol=0)


def test_exact_ties_of_equal_models_go_to_plus_whatever_a_third_rounds_to() -> None:
    """3 + 5 - 8 is a tie; a third of each, rounded and added up, is none."""
    grid = torch.arange(1.0, 60.0)
    one, two = (part.reshape(-1, 1).contiguous() for part in torch.meshgrid(grid, grid, indexing="ij"))
    parts = [one, two, -(one + two)]
    assert bool((sum_with_elected_sign(parts, WEIGHTS["equal"], normalise=True) == (one + two) / 2).all())
    torch.testing.assert_close(sum_with_elected_sign(parts, WEIGHTS["equal"], normalise=False), (one + two) / 3)


def test_a_vote_of_many_models_is_counted_in_double_precision() -> None:
    parts = [torch.tensor([[2.0**30]]), *[torch.tensor([[1.0]])] * 8, torch.tensor([[-(2.0**30) - 128]])]
    weights = [1.0, 1.0, *[0.5] * 7, 1.0]
    assert sum_with_elected_sign(parts, weights, normalise=False).item() == -(2.0**30) - 128


def largest_by_topk(values: Tensor, keep: int) -> Tensor:
    """The smallest magnitude among the ``keep`` largest."""
    return values.abs().flatten().topk(keep).values[-1]


@pytest.mark.parametrize("way", ["partitioned", "counted"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("keep", [1, 17, 10_000, 19_999, 20_000])
def test_the_threshold_is_that_of_topk(kind: str, keep: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fedtune.merging.combine.task_vectors._magnitude_selection._SHORT", 20_000 if way == "partitioned" else 19_999
    )
    [values] = deltas(kind, 1)
    stream: Callable[[], Sequence[Tensor]] = lambda: values.split(3000)  # noqa: E731
    found, equal = find_threshold(stream, keep, len(values)), int((values.abs() == largest_by_topk(values, keep)).sum())
    above = int((values.abs() > largest_by_topk(values, keep)).sum())
    assert found.threshold == float(largest_by_topk(values, keep))
    assert (found.ties, found.whole) == (keep - above, keep - above == equal)


@pytest.mark.parametrize("tied", [1, 3, 5])
def test_a_band_whose_ends_lie_within_ties_takes_them_in_order(tied: int) -> None:
    values = torch.tensor([2.0, -3.0, 3.0, 3.0, -3.0, 3.0, 1.0, 5.0])
    found = merged(a_step("breadcrumbs", {"density": (tied + 0.1) / 8, "gamma": 1.01 / 8}), [{"w": values}])["w"]
    assert found.nonzero()[:, 0].tolist() == [1, 2, 3, 4, 5][:tied]
