"""Drift signals against slow twins and closed forms; references that add up; thresholds."""

import math

import pytest
import torch
from torch import Tensor

from fedtune.continual._drift_signals import (
    LastLayer,
    compute_centred_score,
    compute_coverage_score,
    compute_energies,
    compute_energy_score,
    compute_neuron_states,
    compute_plain_score,
    count_neuron_states,
    sum_energies,
)
from fedtune.continual._drift_sums import FeatureSums, add_feature_sums, compute_moments, sum_features
from fedtune.continual._drift_threshold import SCORE_BINS, compute_threshold, count_scores, list_bin_edges

CLASSES, WIDTH = 3, 5


def draw(n: int, seed: int, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Examples whose classes lie far apart."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=random)
    means = 10 * torch.eye(CLASSES, WIDTH)
    spread = torch.tensor([0.5, 1.0, 1.5, 2.0, 0.8])
    return means[labels] + spread * (torch.randn(n, WIDTH, generator=random) + shift), labels


def make_layer(seed: int = 0) -> LastLayer:
    random = torch.Generator().manual_seed(seed)
    return LastLayer(torch.randn(CLASSES, WIDTH, generator=random), torch.randn(CLASSES, generator=random))


def score_slowly(features: Tensor, labels: Tensor, reference: tuple[Tensor, Tensor]) -> float:
    """Example by example, as the formula stands."""
    known, classes = reference
    mu = {int(c): known[classes == c].double().mean(0) for c in classes.unique()}
    within = sum(
        (row.double() - mu[int(label)]).square() for row, label in zip(known, classes, strict=True)
    ) / (len(known) - len(mu))  # fmt: skip
    total = 0.0
    for j in range(WIDTH):
        mean = sum(float(x[j]) - float(mu[int(y)][j]) for x, y in zip(features, labels, strict=True)) / len(features)
        total += mean**2 / (float(within[j]) + 0.01 * float(within.mean()))
    shares = [int((labels == c).sum()) / len(labels) for c in mu]
    errors = sum(share**2 / int((classes == c).sum()) for share, c in zip(shares, mu, strict=True))
    return total / WIDTH / (1 / len(features) + errors)


def test_centred_score_is_the_formula() -> None:
    reference, (features, labels) = draw(200, 1), draw(16, 2)
    found = compute_centred_score(features, labels, compute_moments(sum_features(*reference, CLASSES)))
    assert found is not None
    assert found.value == pytest.approx(score_slowly(features, labels, reference), rel=1e-9)
    assert (found.num_examples, found.num_unseen) == (16, 0)


def test_sums_of_parts_are_those_of_the_whole() -> None:
    features, labels = draw(90, 3)
    whole = sum_features(features, labels, CLASSES)
    dealt = [sum_features(features[start::4], labels[start::4], CLASSES) for start in range(4)]
    by_class = [sum_features(features[labels == one], labels[labels == one], CLASSES) for one in range(CLASSES)]
    for parts in (dealt, by_class, by_class[::-1]):
        for one, other in zip(add_feature_sums(parts), whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    sent = add_feature_sums([part.to_float32() for part in dealt])
    torch.testing.assert_close(compute_moments(sent).variance, compute_moments(whole).variance, rtol=1e-4, atol=0)
    assert whole.count_bytes() == 4 * (CLASSES + (CLASSES + 1) * WIDTH)


def test_in_domain_score_is_about_one_whatever_the_size() -> None:
    moments = compute_moments(sum_features(*draw(20_000, 4), CLASSES))
    for size in (2, 8, 32):
        scores = [compute_centred_score(*draw(size, seed), moments) for seed in range(300)]
        mean = sum(score.value for score in scores if score is not None) / len(scores)
        assert mean == pytest.approx(1, abs=0.15)


def test_one_class_of_a_small_reference_is_no_stranger_than_a_mixed_batch() -> None:
    """Of 20 reference examples a class, the mean has an error that counts in full for a batch of one class."""
    mixed: list[float] = []
    alone: list[float] = []
    for seed in range(300):
        reference, (features, labels) = draw(60, seed), draw(120, 1000 + seed)
        moments = compute_moments(sum_features(*reference, CLASSES))
        one = labels == labels[0]
        for found, rows in ((mixed, slice(0, 32)), (alone, torch.where(one)[0][:32])):
            score = compute_centred_score(features[rows], labels[rows], moments)
            assert score is not None
            found.append(score.value)
    assert sum(mixed) / len(mixed) == pytest.approx(1, abs=0.1)
    assert sum(alone) / len(alone) == pytest.approx(1, abs=0.1)


def test_shift_by_delta_adds_n_delta_squared() -> None:
    """A shift by delta standard deviations raises the mean of T2/d by n delta^2: the noncentral chi-squared law."""
    moments = compute_moments(sum_features(*draw(20_000, 4), CLASSES))
    found = [compute_centred_score(*draw(32, seed, shift=0.5), moments) for seed in range(200)]
    assert sum(one.value for one in found if one) / len(found) == pytest.approx(1 + 32 * 0.25, rel=0.15)


def test_one_class_raises_the_plain_score_but_not_the_centred_one() -> None:
    features, labels = draw(3000, 5)
    centred, plain = (compute_moments(sum_features(features, one, CLASSES)) for one in (labels, None))
    own, of = draw(400, 6)
    alone = own[of == 1][:32], of[of == 1][:32]
    score = compute_centred_score(*alone, centred)
    assert score is not None
    assert score.value < 2.5
    assert compute_plain_score(alone[0], plain).value > 10
    assert compute_plain_score(own[:32], plain).value < 2.5


def test_unseen_classes_are_counted_and_not_scored() -> None:
    features, labels = draw(200, 7)
    moments = compute_moments(sum_features(features[labels != 2], labels[labels != 2], CLASSES))
    found = compute_centred_score(features, labels, moments)
    alone = compute_centred_score(features[labels != 2], labels[labels != 2], moments)
    assert found is not None
    assert alone is not None
    assert found.value == alone.value
    assert found.num_unseen == int((labels == 2).sum())
    assert compute_centred_score(features[labels == 2], labels[labels == 2], moments) is None


def test_constant_feature_and_single_examples_stay_finite() -> None:
    features, labels = draw(50, 8)
    features[:, 0] = 3.0
    moments = compute_moments(sum_features(features, labels, CLASSES))
    found = compute_centred_score(features, labels, moments)
    assert found is not None
    assert math.isfinite(found.value)
    flat = compute_moments(sum_features(torch.ones(4, WIDTH), torch.zeros(4, dtype=torch.int64), 1))
    assert compute_plain_score(torch.ones(3, WIDTH), flat).value == 0
    one = compute_moments(FeatureSums(*(torch.zeros_like(each) for each in sum_features(features, labels, CLASSES))))
    assert compute_centred_score(features, labels, one) is None


def test_neuron_states_are_the_gradient_of_kl() -> None:
    layer, (features, _) = make_layer(), draw(20, 9)
    features = features / 10
    leaf = features.clone().requires_grad_()
    p = (leaf @ layer.weight.T + layer.bias).log_softmax(-1)
    uniform = torch.full((CLASSES,), 1 / CLASSES)
    kl = (uniform * (uniform.log() - p)).sum()
    (gradient,) = torch.autograd.grad(kl, leaf)
    torch.testing.assert_close(compute_neuron_states(features, layer), torch.sigmoid(100 * features * gradient))


def test_counts_of_states_add_up_bit_equal_and_coverage_is_the_slow_one() -> None:
    layer, (features, _), (others, _) = make_layer(), draw(60, 10), draw(9, 11)
    states = compute_neuron_states(features / 30, layer)
    counts = count_neuron_states(states)
    assert torch.equal(counts, count_neuron_states(states[:20]) + count_neuron_states(states[20:]))
    assert counts.sum(0).tolist() == [60] * WIDTH
    unknown = compute_neuron_states(others / 30, layer)
    full, total = 0.05 * 60, 0.0
    for row in unknown.tolist():
        for j, state in enumerate(row):
            total += min(int(counts[min(int(state * 50), 49), j]) / full, 1)
    expected = 1 - total / unknown.numel()
    assert compute_coverage_score(unknown, counts).value == pytest.approx(expected)
    assert compute_coverage_score(states, counts).value < 0.5


def test_energies_are_those_of_scaled_features() -> None:
    layer, (features, _) = make_layer(), draw(7, 12)
    found = compute_energies(features, layer)
    for row, energy in zip(features.double(), found.tolist(), strict=True):
        positive = sorted((max(float(x), 0) for x in row), reverse=True)
        r = sum(positive) / positive[0]  # 15 % of five features is one
        assert r >= 1
        logits = layer.weight.double() @ (row * math.exp(r)) + layer.bias.double()
        assert energy == pytest.approx(-math.log(sum(math.exp(one) for one in logits.tolist())))
    order = torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(
        compute_energies(features[:, order], LastLayer(layer.weight[:, order], layer.bias)), found
    )


def test_energy_score_is_a_z_score() -> None:
    energies = torch.randn(5000, generator=torch.Generator().manual_seed(1)).double() * 3 + 7
    reference = sum_energies(energies[:2000]) + sum_energies(energies[2000:])
    batch = energies[:32] + 5
    expected = (float(batch.mean()) - float(energies.mean())) / (float(energies.std()) / math.sqrt(32))
    assert compute_energy_score(batch, reference).value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("signal", ["centred", "plain", "nac", "scale"])
def test_threshold_is_the_95th_percentile(signal: str) -> None:
    random = torch.Generator().manual_seed(2)
    drawn = torch.randn(40_000, 8, generator=random).double().square().mean(1)
    scores = drawn * {"nac": 0.05, "scale": 2.0}.get(signal, 1.0)
    counts = count_scores(signal, scores[:100].tolist()) + count_scores(signal, scores[100:].tolist())
    assert torch.equal(counts, count_scores(signal, scores.tolist()))
    assert (len(counts), int(counts.sum())) == (SCORE_BINS, len(scores))
    threshold = compute_threshold(signal, counts)
    assert threshold is not None
    assert float((scores > threshold).double().mean()) == pytest.approx(0.05, abs=0.01)


def test_threshold_without_scores_and_in_open_bins() -> None:
    none = torch.zeros(SCORE_BINS, dtype=torch.int32)
    assert [compute_threshold(signal, none) for signal in ("centred", "plain", "nac", "scale")] == [2, 2, None, None]
    edges = list_bin_edges("centred")
    assert compute_threshold("centred", count_scores("centred", [0.0] * 9)) == pytest.approx(float(edges[0]))
    assert compute_threshold("centred", count_scores("centred", [1e9] * 9)) == pytest.approx(float(edges[-1]))


def test_in_domain_batches_lie_below_the_threshold() -> None:
    """Calibrated on one half, 95 % of the other half's batches lie below."""
    moments = compute_moments(sum_features(*draw(20_000, 13), CLASSES))
    scores = [compute_centred_score(*draw(32, seed), moments) for seed in range(1200)]
    values = [one.value for one in scores if one]
    threshold = compute_threshold("centred", count_scores("centred", values[:600]))
    assert threshold is not None
    assert sum(one < threshold for one in values[600:]) / 600 == pytest.approx(0.95, abs=0.03)
