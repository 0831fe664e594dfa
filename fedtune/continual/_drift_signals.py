"""Drift signals: one number for a batch of examples, which grows as the batch departs from a reference.

centred  T2/d of the batch mean, each example centred by the mean of its class. A change of the class mix, such as a
         batch of a single class, hardly raises it. In the domain of the reference it is about 1.
plain    T2/d of the batch mean without labels. A change of the class mix raises it, too.
nac      1 - neuron activation coverage: Liu et al., "Neuron Activation Coverage", ICLR 2024, eq. 3 to 6, on the inputs
         of the last layer, where the gradient of KL(uniform || softmax) is W^T (p - 1/C) in closed form.
scale    minus the energy score of scaled features: Xu et al., "SCALE", ICLR 2024, eq. 5 and 6, as a z-score of the
         batch mean. Features are signed in transformers, so the scaling factor is that of their positive part.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fedtune.continual._drift_sums import FeatureMoments

__all__ = [
    "BatchScore",
    "LastLayer",
    "compute_centred_score",
    "compute_coverage_score",
    "compute_energies",
    "compute_energy_score",
    "compute_neuron_states",
    "compute_plain_score",
    "count_neuron_states",
    "sum_energies",
]

SCALE_PERCENTILE = 85
NAC_BINS = 50
NAC_STEEPNESS = 100.0
NAC_FULL_SHARE = 0.05
"""A bin is covered in full when it holds this share of the reference examples: 50 of 1000, as published."""


class BatchScore(NamedTuple):
    """The signal of a batch, the examples it is of, and those of classes that the reference has not seen."""

    value: float
    num_examples: int
    num_unseen: int = 0


class LastLayer(NamedTuple):
    """The weight [classes, width] and bias [classes] that make logits of features, only of the classes in use."""

    weight: Tensor
    bias: Tensor


def compute_centred_score(features: Tensor, labels: Tensor, moments: FeatureMoments) -> BatchScore | None:
    """Return 1/d sum_j mean_i(x_ij - mu_cj)^2 / (w_j^2 v) with c the class of example i.

    v = 1/n + sum_c (n_c/n)^2 / N_c: the means of N_c reference examples have errors too, which a batch of one class has
    in full and a mixed one hardly. An example of a class that the reference has not seen is no score: it is counted
    apart. None without any other.
    """
    known = moments.counts[labels] > 0
    rows, classes = features[known].double(), labels[known]
    if not len(rows):
        return None
    shares = torch.bincount(classes, minlength=len(moments.counts)) / len(rows)
    return BatchScore(_compute_t2(rows - moments.means[classes], shares, moments), len(rows), int((~known).sum()))


def compute_plain_score(features: Tensor, moments: FeatureMoments) -> BatchScore:
    """Return T2/d of the batch mean. ``moments`` are those of sums made without labels."""
    whole = torch.ones(1, dtype=torch.float64)
    return BatchScore(_compute_t2(features.double() - moments.means[0], whole, moments), len(features))


def _compute_t2(centred: Tensor, shares: Tensor, moments: FeatureMoments) -> float:
    """Return 0 for features that never varied and did not move either."""
    variance = moments.variance.clamp(min=torch.finfo(torch.float64).tiny)
    spread = 1 / len(centred) + float((shares.double().square() / moments.counts.clamp(min=1)).sum())
    return float((centred.mean(0).square() / variance).mean()) / spread


def compute_neuron_states(features: Tensor, layer: LastLayer) -> Tensor:
    """Return sigmoid(alpha x dKL/dx) of each feature of each example, which lies in 0..1."""
    p = (features @ layer.weight.T + layer.bias).softmax(-1)
    return torch.sigmoid(NAC_STEEPNESS * features * ((p - 1 / p.shape[-1]) @ layer.weight))


def count_neuron_states(states: Tensor) -> Tensor:
    """Return how many examples have each feature's state in each bin [bins, width], int32. Counts can be added."""
    one_hot = torch.nn.functional.one_hot(_find_bins(states), NAC_BINS)
    return one_hot.sum(0).T.contiguous().int()


def compute_coverage_score(states: Tensor, counts: Tensor) -> BatchScore:
    """Return 1 - mean Phi, Phi = min(count of the bin / O, 1)."""
    full = NAC_FULL_SHARE * float(counts[:, 0].sum())
    covered = (counts.double() / full).clamp(max=1).gather(0, _find_bins(states))
    return BatchScore(1 - float(covered.mean()), len(states))


def _find_bins(states: Tensor) -> Tensor:
    return (states * NAC_BINS).long().clamp(max=NAC_BINS - 1)


def compute_energies(features: Tensor, layer: LastLayer) -> Tensor:
    """Return -logsumexp of the logits of x exp(r) for each example, r = sum a / sum of the largest 15 % of a."""
    positive = features.relu().double()
    kept = max(1, round(features.shape[1] * (100 - SCALE_PERCENTILE) / 100))
    largest = positive.topk(kept, 1).values.sum(1).clamp(min=torch.finfo(torch.float64).tiny)
    scaled = features.double() * (positive.sum(1) / largest).exp()[:, None]
    return -(scaled @ layer.weight.double().T + layer.bias.double()).logsumexp(-1)


def sum_energies(energies: Tensor) -> Tensor:
    """Return count, sum and sum of squares [3], which add up over clients."""
    values = energies.double()
    return torch.stack([torch.tensor(float(len(values)), dtype=torch.float64), values.sum(), values.square().sum()])


def compute_energy_score(energies: Tensor, reference: Tensor) -> BatchScore:
    """Return the z-score of the mean energy. ``reference`` is that of ``sum_energies``."""
    count, total, squares = reference.double().tolist()
    mean = total / count
    variance = max((squares - count * mean**2) / max(count - 1, 1), 0.0)
    spread = math.sqrt(variance / len(energies)) or math.inf
    return BatchScore((float(energies.mean()) - mean) / spread, len(energies))
