"""Analytic heads: federated equals central in any order and split, sklearn and numpy as oracles, limits."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from torch import Tensor

from fedtune.continual._analytic_heads import (
    RIDGE_GRID,
    UNSEEN_BIAS,
    LinearHead,
    choose_ridge_by_halves,
    choose_ridge_by_validation,
    fit_ridge,
    fit_slda,
    score_features,
)
from fedtune.continual._feature_sums import FEATURE_STEP, FeatureSums, add_sums, sum_features, unpack_triangle
from fedtune.continual._random_projection import ProjectedHead, make_projection
from fedtune.errors import RecipeError
from tests.analytic_examples import CLASSES, WIDTH, make_features, split_rows
from tests.test_feature_sums import SPLITS, sums_of

Fit = Callable[[FeatureSums], LinearHead]
FITS: dict[str, Fit] = {"slda": lambda sums: fit_slda(sums, 0.1), "ridge": lambda sums: fit_ridge(sums, 0.1)}


def rounded(features: Tensor) -> Tensor:
    return torch.round(features.double() / FEATURE_STEP) * FEATURE_STEP


def largest_difference(one: LinearHead, other: LinearHead, features: Tensor) -> float:
    """The largest difference of scores, relative to the largest score."""
    a, b = score_features(one, features), score_features(other, features)
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
@pytest.mark.parametrize("split", SPLITS)
def test_federated_heads_equal_the_central_one(fit: Fit, split: str) -> None:
    features, labels = make_features()
    central = fit(sums_of(features, labels, len(labels)))
    for seed in range(3):
        parts = [sums_of(features[rows], labels[rows]) for rows in split_rows(labels, split, seed)]
        order = np.random.default_rng(seed).permutation(len(parts))
        federated = fit(add_sums([parts[at] for at in order]))
        assert torch.equal(federated.weight, central.weight)
        assert torch.equal(federated.bias, central.bias)
        single = [FeatureSums(*(tensor.float() for tensor in part)) for part in parts]
        assert 0 < largest_difference(fit(add_sums(single)), central, features) < 1e-5


@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 0, 4, 5, 1, 3]])
def test_classes_that_arrive_one_by_one_give_the_joint_head(fit: Fit, order: Sequence[int]) -> None:
    features, labels = make_features()
    stream = add_sums([sums_of(features[labels == label], labels[labels == label]) for label in order])
    joint = fit(sums_of(features, labels))
    assert all(torch.equal(a, b) for a, b in zip(fit(stream), joint, strict=True))


def test_a_new_class_leaves_the_targets_of_old_classes_as_they_were() -> None:
    """The column of a class in the stream is the one of a regression on its own one-hot target alone."""
    features, labels = make_features()
    head = fit_ridge(sums_of(features, labels), 0.1)
    x = rounded(features).numpy()
    penalty = 0.1 * np.trace(x.T @ x) / WIDTH
    for label in range(CLASSES):
        oracle = Ridge(alpha=penalty, fit_intercept=False, solver="cholesky").fit(x, labels.numpy() == label)
        np.testing.assert_allclose(head.weight[label].numpy(), oracle.coef_, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 0.7])
def test_slda_agrees_with_sklearn(shrinkage: float) -> None:
    """On equally many examples per class, because sklearn weighs the classes' covariances by their priors."""
    features, labels = make_features()
    rows = torch.cat([torch.nonzero(labels == label)[:70, 0] for label in range(CLASSES)])
    x, y = rounded(features[rows]).numpy(), labels[rows].numpy()
    oracle = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, priors=np.full(CLASSES, 1 / CLASSES))
    wanted = oracle.fit(x, y).decision_function(x)
    found = score_features(fit_slda(sums_of(features[rows], labels[rows]), shrinkage), torch.from_numpy(x)).numpy()
    found, wanted = found - found[:, :1], wanted - wanted[:, :1]
    assert np.abs(found - wanted).max() < 1e-6 * np.abs(wanted).max()


@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_a_class_without_examples_never_wins(fit: Fit) -> None:
    features, labels = make_features()
    known = (labels != 2) & (labels != 5)
    head = fit(sums_of(features[known], labels[known]))
    scores = score_features(head, 100 * torch.cat([features, -features]))
    assert scores.isfinite().all()
    assert not {2, 5} & set(scores.argmax(1).tolist())
    assert head.bias[2] == head.bias[5] == UNSEEN_BIAS


def test_a_large_ridge_gives_the_class_totals() -> None:
    features, labels = make_features()
    sums, ridge = sums_of(features, labels), 1e9
    scale = ridge * torch.trace(rounded(features).T @ rounded(features)) / WIDTH
    torch.testing.assert_close(fit_ridge(sums, ridge).weight * scale, sums.totals, rtol=1e-6, atol=1e-6)


def test_fewer_examples_than_features_fit_with_a_ridge_and_not_without_shrinkage() -> None:
    features, labels = make_features(examples=12)
    sums = sums_of(features, labels)
    predictions = score_features(fit_ridge(sums, 1e-6), features).argmax(1)
    assert torch.equal(predictions, labels)
    assert fit_slda(sums, 0.1).weight.isfinite().all()
    with pytest.raises(RecipeError, match="set shrinkage above 0"):
        fit_slda(sums, 0.0)


@pytest.mark.parametrize("ridge", [1e-12, 1e-9])
def test_a_gram_matrix_that_rounding_made_indefinite_still_gives_a_head(ridge: float) -> None:
    features, labels = make_features(examples=12)
    exact = sums_of(features, labels)
    single = FeatureSums(*(tensor.float().double() for tensor in exact))
    assert torch.linalg.eigvalsh(unpack_triangle(single.gram, WIDTH))[0] < -ridge * single.gram.abs().max()
    assert torch.equal(score_features(fit_ridge(single, ridge), features).argmax(1), labels)


def test_the_ridge_chosen_on_validation_examples_has_the_fewest_errors() -> None:
    features, labels = make_features(60, seed=1)
    held, truth = make_features(400, seed=2)
    sums = sums_of(features[labels < 4], labels[labels < 4])
    chosen = choose_ridge_by_validation(sums, held, truth)
    shown = truth < 4
    errors = {
        ridge: int((score_features(fit_ridge(sums, ridge), held[shown]).argmax(1) != truth[shown]).sum())
        for ridge in RIDGE_GRID
    }
    assert chosen == max(ridge for ridge, count in errors.items() if count == min(errors.values()))
    assert len(set(errors.values())) > 1


def test_the_ridge_chosen_by_halves_has_the_least_squared_error_on_the_other_half() -> None:
    features, labels = make_features(60, seed=1)
    half = torch.arange(60) % 2 == 0
    one, other = sums_of(features[half], labels[half]), sums_of(features[~half], labels[~half])
    errors = {}
    for ridge in RIDGE_GRID:
        errors[ridge] = sum(
            float(
                (score_features(fit_ridge(sums, ridge), rounded(features[rows])) - one_hot(labels[rows])).square().sum()
            )
            for sums, rows in ((one, ~half), (other, half))
        )
    assert choose_ridge_by_halves(one, other) == min(errors, key=lambda ridge: errors[ridge])
    assert 1e-6 < choose_ridge_by_halves(one, other) <= 1


def one_hot(labels: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(labels, CLASSES).double()


def test_the_projection_has_the_bits_that_every_machine_draws() -> None:
    made = make_projection(7, 384, 100)
    digest = hashlib.sha256(made.numpy().tobytes()).hexdigest()
    assert digest == "91481bc81c5f1722a06a310f11177e31b8945ddd826f580830540d4fb5155f13"
    assert torch.equal(made, make_projection(7, 384, 100))
    assert not torch.equal(made, make_projection(8, 384, 100))
    assert abs(float(made.std()) * 384**0.5 - 1) < 0.02


def test_a_projected_head_scores_random_features_and_keeps_the_projection_out_of_the_state() -> None:
    features, labels = make_features()
    head = ProjectedHead(3, torch.nn.Linear(WIDTH, CLASSES), 64)
    hidden = torch.relu(features @ make_projection(3, WIDTH, 64))
    fitted = fit_ridge(sum_features([(hidden, labels)], CLASSES, 64), 0.01)
    head.linear.load_state_dict({"weight": fitted.weight.float(), "bias": fitted.bias.float()})
    torch.testing.assert_close(head(features).double(), score_features(fitted, hidden), rtol=1e-4, atol=1e-4)
    assert set(head.state_dict()) == {"linear.weight", "linear.bias"}
