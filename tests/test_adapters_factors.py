"""Sums, means and inner products of low-rank matrices by their factors, beside dense twins in double precision."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fedtune.memory import StorageMeter
from fedtune.merging._factor_svd import compute_core, count_kept_singular_values, truncate_product
from fedtune.merging._low_rank_factors import (
    LowRankFactors,
    average_factors,
    compute_averaging_error,
    compute_averaging_residual,
    compute_inner_product,
    compute_product_norm,
    pad_factors,
    stack_factors,
)

D, K = 24, 17
RANKS, SCALES, WEIGHTS = (4, 2, 7), (2.0, 0.5, 16 / math.sqrt(7)), (0.5, 0.2, 0.3)


def drawn(ranks: Sequence[int] = RANKS, scales: Sequence[float] = SCALES, seed: int = 0) -> list[LowRankFactors]:
    random = torch.Generator().manual_seed(seed)
    return [
        LowRankFactors(torch.randn(D, r, generator=random), torch.randn(r, K, generator=random), s)
        for r, s in zip(ranks, scales, strict=True)
    ]


def drifted(count: int, rank: int, drift: float) -> list[LowRankFactors]:
    """A common start, and clients that leave it by ``drift`` times the factors' own scale, each its own way."""
    random = torch.Generator().manual_seed(1)
    b, a = torch.randn(576, rank, generator=random), torch.randn(rank, 576, generator=random)

    def near(tensor: Tensor) -> Tensor:
        return tensor + drift * torch.randn(tensor.shape, generator=random)

    return [LowRankFactors(near(b), near(a)) for _ in range(count)]


def dense(factors: LowRankFactors) -> Tensor:
    return factors.scale * factors.b.double() @ factors.a.double()


def mean(factors: Sequence[LowRankFactors], weights: Sequence[float]) -> Tensor:
    return torch.stack([w * dense(one) for one, w in zip(factors, weights, strict=True)]).sum(0)


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_stacking_is_exact_for_unequal_weights_ranks_and_scales() -> None:
    whole = stack_factors(drawn(), WEIGHTS)
    assert whole.rank == sum(RANKS)
    assert relative(dense(whole), mean(drawn(), WEIGHTS)) < 1e-14
    single = LowRankFactors(whole.b.float(), whole.a.float())
    assert relative(dense(single), mean(drawn(), WEIGHTS)) < 1e-6


def test_stacking_in_another_order_is_the_same_matrix() -> None:
    order = [2, 0, 1]
    turned = stack_factors([drawn()[k] for k in order], [WEIGHTS[k] for k in order])
    assert relative(dense(turned), dense(stack_factors(drawn(), WEIGHTS))) < 1e-14


@pytest.mark.parametrize("function", [stack_factors, average_factors, compute_averaging_residual])
def test_a_client_of_weight_zero_changes_nothing(function: object) -> None:
    assert callable(function)
    alone = function(drawn()[1:], (0.4, 0.6))
    spoilt = LowRankFactors(torch.full((D, 3), 1e9), torch.full((3, K), 1e9))
    with_it = function([*drawn()[1:], spoilt], (0.4, 0.6, 0.0))
    assert relative(dense(with_it), dense(alone)) < 1e-12


def test_rank_zero_takes_part_as_a_matrix_of_zeros() -> None:
    nothing = LowRankFactors(torch.zeros(D, 0), torch.zeros(0, K), 2.0)
    whole = stack_factors([drawn()[0], nothing], (0.5, 0.5))
    assert relative(dense(whole), 0.5 * dense(drawn()[0])) < 1e-14
    assert compute_product_norm(nothing) == 0
    empty = truncate_product(stack_factors([nothing, nothing], (0.5, 0.5)), rank=3)
    assert (empty.factors.rank, empty.relative_error) == (0, 0.0)
    assert compute_averaging_error([nothing, nothing], (0.5, 0.5)) == 0


def test_a_weight_of_zero_for_all_gives_zeros() -> None:
    assert torch.equal(dense(stack_factors(drawn(), (0, 0, 0))), torch.zeros(D, K, dtype=torch.float64))


def test_inner_products_and_norms_are_those_of_the_dense_matrices() -> None:
    one, other = drawn()[:2]
    assert compute_inner_product(one, other) == pytest.approx(float((dense(one) * dense(other)).sum()), rel=1e-12)
    assert compute_product_norm(one) == pytest.approx(float(dense(one).norm()), rel=1e-12)


def test_the_covariance_of_the_factors_is_what_their_mean_misses() -> None:
    factors = drawn((4, 4, 4))
    missed = mean(factors, WEIGHTS) - dense(average_factors(factors, WEIGHTS))
    assert missed.norm() > 1
    assert relative(dense(compute_averaging_residual(factors, WEIGHTS)), missed) < 1e-13
    assert compute_averaging_error(factors, WEIGHTS) == pytest.approx(
        relative(mean(factors, WEIGHTS) - missed, mean(factors, WEIGHTS))
    )


def test_the_identity_holds_for_padded_ranks_too() -> None:
    missed = mean(drawn(), WEIGHTS) - dense(average_factors(drawn(), WEIGHTS))
    assert relative(dense(compute_averaging_residual(drawn(), WEIGHTS)), missed) < 1e-13


@pytest.mark.parametrize(("count", "rank"), [(3, 16), (10, 72)])
def test_the_remainder_has_one_block_less_than_there_are_clients(count: int, rank: int) -> None:
    left = compute_averaging_residual(drifted(count, 8, 1.0), [1 / count] * count)
    assert left.rank == rank
    assert int(torch.linalg.matrix_rank(dense(left))) == rank


@pytest.mark.parametrize("common", ["b", "a"])
def test_averaging_is_exact_while_one_factor_is_common(common: str) -> None:
    factors = [one._replace(**{common: getattr(drifted(1, 8, 0)[0], common)}) for one in drifted(3, 8, 1.0)]
    assert compute_averaging_error(factors, WEIGHTS) == 0
    assert relative(dense(average_factors(factors, WEIGHTS)), mean(factors, WEIGHTS)) < 1e-14


def test_products_that_cancel_have_an_infinite_error_and_nothing_missed_has_none() -> None:
    [one] = drawn((4,), (1.0,))
    against = [one, LowRankFactors(-2 * one.b, one.a / 2), LowRankFactors(one.b * 0, one.a)]
    assert compute_averaging_error(against, (0.5, 0.5, 0.0)) == math.inf
    assert compute_averaging_error([one, LowRankFactors(-one.b, one.a)], (0.5, 0.5)) == 0


@pytest.mark.parametrize("drift", [0.1, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("count", [3, 10])
def test_averaging_factors_errs_as_independent_drifts_say(drift: float, count: int) -> None:
    """Of size x^2 sqrt(K - 1) / K beside a mean product of squared size 1 + (2 x^2 + x^4) / K."""
    wanted = drift**2 * math.sqrt(count - 1) / count / math.sqrt(1 + (2 * drift**2 + drift**4) / count)
    assert compute_averaging_error(drifted(count, 8, drift), [1 / count] * count) == pytest.approx(wanted, rel=0.06)


def test_equal_adapters_give_that_adapter() -> None:
    [one] = drawn((4,), (2.0,))
    whole = stack_factors([one] * 5, [0.2] * 5)
    again = truncate_product(whole, energy=1.0, scale=2.0)
    assert again.factors.rank == 4
    assert relative(dense(again.factors), dense(one)) < 1e-12
    assert compute_averaging_error([one] * 5, [0.2] * 5) == 0
    assert relative(dense(average_factors([one] * 5, [0.2] * 5)), dense(one)) < 1e-14


def test_the_small_core_has_the_singular_values_of_the_dense_matrix() -> None:
    whole = stack_factors(drawn(), WEIGHTS)
    core = compute_core(whole)
    assert core.core.shape == (13, 13)
    torch.testing.assert_close(core.q1 @ core.core @ core.q2, dense(whole))
    wanted = torch.linalg.svdvals(mean(drawn(), WEIGHTS))[:13]
    torch.testing.assert_close(torch.linalg.svdvals(core.core), wanted)


@pytest.mark.parametrize("rank", [1, 3, 8, 13, 40])
def test_the_reduction_is_the_best_of_its_rank_and_its_error_the_tail(rank: int) -> None:
    whole = stack_factors(drawn(), WEIGHTS)
    u, s, vh = torch.linalg.svd(mean(drawn(), WEIGHTS), full_matrices=False)
    best = u[:, :rank] * s[:rank] @ vh[:rank]
    found = truncate_product(whole, rank)
    assert found.factors.rank == min(rank, 13)
    assert relative(dense(found.factors), best) < 1e-12
    assert found.dropped_norm == pytest.approx(float(s[rank:].norm()), abs=1e-12)
    assert found.relative_error == pytest.approx(relative(dense(found.factors), dense(whole)), abs=1e-12)


def test_the_whole_rank_is_exact_and_the_error_falls_with_the_rank() -> None:
    errors = [truncate_product(stack_factors(drawn(), WEIGHTS), rank).relative_error for rank in range(14)]
    assert errors[0] == 1
    assert errors[-1] < 1e-14
    assert errors == sorted(errors, reverse=True)
    assert truncate_product(stack_factors(drawn(), WEIGHTS)).relative_error == 0


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_the_smallest_rank_with_the_energy_is_chosen(energy: float) -> None:
    whole = stack_factors(drawn(), WEIGHTS)
    found = truncate_product(whole, energy=energy)
    assert 1 - found.relative_error**2 >= energy - 1e-12
    assert found.factors.rank == 1 or 1 - truncate_product(whole, found.factors.rank - 1).relative_error ** 2 < energy
    assert truncate_product(whole, 2, energy).factors.rank <= 2


def test_no_singular_value_is_kept_of_zeros() -> None:
    assert count_kept_singular_values(torch.zeros(3), None, 0.9) == 0
    assert count_kept_singular_values(torch.zeros(3), 2, None) == 2


@pytest.mark.parametrize("scale", [1.0, 4.0, -0.5])
def test_factors_share_the_singular_values_evenly_at_the_scale_asked_for(scale: float) -> None:
    found = truncate_product(stack_factors(drawn(), WEIGHTS), 4, scale=scale).factors
    assert found.scale == scale
    torch.testing.assert_close(found.b.T @ found.b, found.a @ found.a.T)
    assert relative(dense(found), dense(truncate_product(stack_factors(drawn(), WEIGHTS), 4).factors)) < 1e-12


def test_half_precision_factors_are_read_in_double() -> None:
    half = [LowRankFactors(one.b.half(), one.a.half(), one.scale) for one in drawn()]
    found = truncate_product(stack_factors(half, WEIGHTS))
    assert relative(dense(found.factors), mean(half, WEIGHTS)) < 1e-12


def test_padding_adds_zeros_and_cutting_takes_the_first() -> None:
    one = drawn()[0]
    wide, narrow = pad_factors(one, 6), pad_factors(one, 3)
    assert torch.equal(dense(wide), dense(one))
    assert (wide.rank, narrow.rank) == (6, 3)
    assert torch.equal(narrow.b, one.b[:, :3])
    assert torch.equal(narrow.a, one.a[:3])


def test_a_large_product_is_never_formed_out() -> None:
    random = torch.Generator().manual_seed(0)
    factors = [
        LowRankFactors(torch.randn(3000, 4, generator=random), torch.randn(4, 3000, generator=random)) for _ in range(3)
    ]
    with StorageMeter(excluded=[tensor for one in factors for tensor in one[:2]]) as meter:
        truncate_product(stack_factors(factors, WEIGHTS), 4)
        compute_averaging_error(factors, WEIGHTS)
    assert meter.peak_bytes < 3000 * 3000 * 8 / 8
