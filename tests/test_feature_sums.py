"""Sums over features: they add up for any split, in any order, bit for bit, and each client counts once."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from fedtune.continual._feature_sums import (
    FEATURE_STEP,
    FeatureSums,
    add_sums,
    count_once,
    list_uncounted,
    make_empty_sums,
    pack_triangle,
    select_shared_rows,
    sum_features,
    unpack_triangle,
)
from fedtune.errors import DataError
from tests.analytic_examples import CLASSES, WIDTH, make_features, split_rows

SPLITS = ["even", "dirichlet", "one class each"]


def sums_of(features: Tensor, labels: Tensor, batch: int = 32) -> FeatureSums:
    pairs = zip(features.split(batch), labels.split(batch), strict=True)
    return sum_features(pairs, CLASSES, WIDTH)


def same_bits(one: FeatureSums, other: FeatureSums) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_sums_are_those_of_numpy_in_double_precision() -> None:
    features, labels = make_features()
    found = sums_of(features, labels)
    x = np.round(features.double().numpy() / FEATURE_STEP) * FEATURE_STEP
    assert np.abs(x - features.double().numpy()).max() <= FEATURE_STEP / 2
    np.testing.assert_allclose(unpack_triangle(found.gram, WIDTH).numpy(), x.T @ x, rtol=1e-13)
    for label in range(CLASSES):
        chosen = labels.numpy() == label
        assert found.counts[label] == chosen.sum()
        np.testing.assert_allclose(found.totals[label].numpy(), x[chosen].sum(0), rtol=0, atol=1e-11)


@pytest.mark.parametrize("split", SPLITS)
def test_any_split_order_and_batch_gives_the_bits_of_one_pass_over_all_examples(split: str) -> None:
    features, labels = make_features()
    whole = sums_of(features, labels, batch=len(labels))
    for seed in range(3):
        parts = [sums_of(features[rows], labels[rows], 7 + seed) for rows in split_rows(labels, split, seed)]
        order = np.random.default_rng(seed).permutation(len(parts))
        assert same_bits(add_sums([parts[at] for at in order]), whole)


def test_without_rounded_features_the_order_changes_bits() -> None:
    """The planted fault: plain double sums of the same features differ from order to order."""
    x = make_features()[0].double()
    assert not torch.equal(x.T @ x, x.flip(0).T @ x.flip(0))


def test_a_packed_triangle_unpacks_to_the_symmetric_matrix() -> None:
    matrix = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = matrix + matrix.T
    packed = pack_triangle(matrix)
    assert packed.tolist()[:6] == [*matrix[0].tolist(), matrix[1, 1].item()]
    assert torch.equal(unpack_triangle(packed, 5), matrix)


def test_a_repeated_round_and_a_client_that_sends_twice_change_nothing() -> None:
    features, labels = make_features()
    parts = dict(enumerate(sums_of(features[rows], labels[rows]) for rows in split_rows(labels, "even", 0)))
    start, counted = make_empty_sums(CLASSES, WIDTH), torch.zeros(2, 4, dtype=torch.uint8)
    once, noted = count_once(start, counted, 1, {2: parts[2], 0: parts[0]})
    assert same_bits(once, add_sums([parts[0], parts[2]]))
    assert noted.tolist() == [[0, 0, 0, 0], [1, 0, 1, 0]]
    assert not counted.any()
    again, still = count_once(once, noted, 1, {0: parts[0], 2: parts[1]})
    assert same_bits(again, once)
    assert torch.equal(still, noted)
    later, last = count_once(once, noted, 1, parts)
    assert same_bits(later, sums_of(features, labels))
    assert not list_uncounted(last, 1)
    assert list_uncounted(last, 0) == [0, 1, 2, 3]


def test_a_border_without_uploads_keeps_the_sums() -> None:
    total, counted = sums_of(*make_features()), torch.zeros(1, 2, dtype=torch.uint8)
    found, noted = count_once(total, counted, 0, {})
    assert same_bits(found, total)
    assert torch.equal(noted, counted)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_feature_that_is_not_finite_is_refused(wrong: float) -> None:
    features, labels = make_features()
    features[3, 1] = wrong
    with pytest.raises(DataError, match="not finite numbers"):
        sums_of(features, labels)


@pytest.mark.parametrize(
    ("labels", "fewest", "rows"),
    [([0, 1, 1, 2, 2, 2], 2, [1, 2, 3, 4, 5]), ([0, 0, 1], 3, []), ([4], 1, [0]), ([], 8, [])],
)
def test_classes_with_few_examples_are_withheld(labels: Sequence[int], fewest: int, rows: Sequence[int]) -> None:
    assert select_shared_rows(torch.tensor(labels, dtype=torch.int64), fewest).tolist() == rows
