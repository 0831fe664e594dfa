"""Low-rank increments of base weights: exact beside dense twins, the same bits by whatever way, whole on the wire."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from fedtune.memory import StorageMeter
from fedtune.merging import Increment, add_increments, join_increments, split_increments
from fedtune.merging._increments import add_increment, make_increment
from fedtune.merging._low_rank_factors import LowRankFactors, compute_averaging_residual, stack_factors
from fedtune.wire.client_update import decode_tensors, pack, packed_size

D, K = 24, 17
RANKS, SCALES, WEIGHTS = (4, 2, 3), (2.0, 0.5, 16 / 7), (0.5, 0.2, 0.3)


def drawn(ranks: Sequence[int] = RANKS, seed: int = 0) -> list[LowRankFactors]:
    random = torch.Generator().manual_seed(seed)
    return [
        LowRankFactors(torch.randn(D, r, generator=random), torch.randn(r, K, generator=random), s)
        for r, s in zip(ranks, SCALES, strict=True)
    ]


def dense(factors: Sequence[LowRankFactors]) -> Tensor:
    return torch.stack([w * f.scale * f.b.double() @ f.a.double() for w, f in zip(WEIGHTS, factors, strict=True)]).sum(
        0
    )


def slowly(weight: Tensor, increment: Increment) -> Tensor:
    """Number by number, in Python's own double precision."""
    after = np.zeros(weight.shape, dtype=np.float32)
    for i, j in np.ndindex(*weight.shape):
        total = 0.0
        for r in range(len(increment.right)):
            total += float(increment.left[i, r]) * float(increment.right[r, j])
        after[i, j] = np.float32(float(weight[i, j]) + total)
    return torch.from_numpy(after)


def weight(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape or (D, K), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("threads", [1, 3])
def test_the_bits_are_those_of_sums_rank_by_rank(threads: int) -> None:
    increment, before = make_increment(stack_factors(drawn(), WEIGHTS)), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(add_increment(weight(), increment), slowly(weight(), increment))
    finally:
        torch.set_num_threads(before)


def test_pieces_of_a_large_weight_have_the_bits_of_the_whole() -> None:
    random = torch.Generator().manual_seed(1)
    one = Increment(torch.randn(700, 5, generator=random), torch.randn(5, 300, generator=random))
    whole, part = add_increment(weight(700, 300), one), slice(431, 433)
    assert torch.equal(whole[part], slowly(weight(700, 300)[part], Increment(one.left[part], one.right)))


def test_an_increment_is_the_sum_of_the_products_to_single_precision() -> None:
    wanted = dense(drawn())
    increment = make_increment(stack_factors(drawn(), WEIGHTS))
    found = increment.left.double() @ increment.right.double()
    assert float((found - wanted).norm() / wanted.norm()) < 2e-7
    assert {tensor.dtype for tensor in increment} == {torch.float32}
    torch.testing.assert_close(add_increment(weight(), increment), (weight() + wanted).float(), rtol=0, atol=1e-5)


def test_an_increment_tells_the_sum_and_not_its_summands() -> None:
    """Two sets of clients with the same sum give the same factors, up to signs and rounding."""
    one = stack_factors(drawn(), WEIGHTS)
    mix, _ = torch.linalg.qr(torch.randn(one.rank, one.rank, generator=torch.Generator().manual_seed(5)).double())
    other = LowRankFactors(one.b @ mix, mix.T @ one.a, one.scale)
    first, second = make_increment(one), make_increment(other)
    torch.testing.assert_close(first.left.abs(), second.left.abs(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(first.right.abs(), second.right.abs(), rtol=1e-3, atol=1e-4)


def test_rank_that_is_rounding_only_is_not_kept() -> None:
    one = drawn()[0]
    assert len(make_increment(stack_factors([one, one, one], WEIGHTS)).right) == one.rank
    assert len(make_increment(compute_averaging_residual([one, one, one], WEIGHTS)).right) == 0
    nothing = make_increment(stack_factors([LowRankFactors(torch.zeros(D, 2), one.a[:2])] * 3, WEIGHTS))
    assert torch.equal(add_increment(weight(), nothing), weight())


def test_a_transposed_weight_gets_the_transpose_and_the_one_before_stays() -> None:
    increment, before = make_increment(stack_factors(drawn(), WEIGHTS)), weight(K, D)
    after = add_increment(before, increment, transposed=True)
    assert torch.equal(after, slowly(weight(K, D).T, increment).T)
    assert torch.equal(before, weight(K, D))


def test_a_convolutions_kernel_is_added_to() -> None:
    one = LowRankFactors(torch.randn(D, 3), torch.randn(3, 4, 2, 2).flatten(1))
    increment = make_increment(one)
    found = add_increment(torch.zeros(D, 4, 2, 2), increment).flatten(1)
    torch.testing.assert_close(found, (one.b @ one.a), rtol=1e-5, atol=1e-5)


def test_the_dense_product_is_never_held_whole() -> None:
    increment = Increment(torch.randn(3000, 4), torch.randn(4, 3000))
    before = torch.zeros(3000, 3000)
    with StorageMeter(excluded=[*increment, before]) as meter:
        add_increment(before, increment)
    assert meter.peak_bytes < 3000 * 3000 * 4 * 1.1


def test_rounds_are_added_one_after_the_other_also_after_a_way_over_the_wire() -> None:
    steps = [{"a.weight": make_increment(stack_factors(drawn(seed=seed), WEIGHTS))} for seed in (1, 2, 3)]
    del steps[1]["a.weight"]
    wanted = slowly(slowly(weight(), steps[0]["a.weight"]), steps[2]["a.weight"])
    beside = {"a.lora_A": torch.randn(2, 3), "classifier.bias": torch.randn(3).bfloat16()}
    sent = {**beside, **join_increments(steps)}
    assert packed_size(sent) == len(pack(sent))
    rest, came = split_increments(decode_tensors(pack(sent)))
    assert rest.keys() == beside.keys()
    assert torch.equal(add_increments(weight(), "a.weight", came), wanted)
    assert torch.equal(add_increments(weight(), "b.weight", came), weight())
