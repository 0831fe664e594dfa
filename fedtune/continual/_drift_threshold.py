"""The threshold of a drift signal: the 95th percentile of the scores of batches in the domain of the reference.

Each client counts the scores of batches of its own examples in 64 bins. The edges are the same everywhere, so the
counts add up. The first and the last bin are open.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["DEFAULT_THRESHOLDS", "SCORE_BINS", "compute_threshold", "count_scores", "list_bin_edges"]

SCORE_BINS = 64
QUANTILE = 0.95
_RANGES = {"centred": (-3.0, 9.0), "plain": (-3.0, 9.0), "nac": (-12.0, 0.0)}
"""Powers of two between which the edges of a positive signal lie."""
DEFAULT_THRESHOLDS = {"centred": 2.0, "plain": 2.0}
"""Where nothing was calibrated. T2/d is about 1 in domain by construction; other signals have no such value."""


def list_bin_edges(signal: str) -> Tensor:
    """Return the 63 inner edges of the bins of a signal."""
    if signal == "scale":
        return torch.linspace(-4, 12, SCORE_BINS - 1, dtype=torch.float64)
    low, high = _RANGES[signal]
    return torch.logspace(low, high, SCORE_BINS - 1, base=2, dtype=torch.float64)


def count_scores(signal: str, scores: Sequence[float]) -> Tensor:
    """Return how many scores fall into each bin, int32. Counts can be added."""
    bins = torch.bucketize(torch.tensor(scores, dtype=torch.float64), list_bin_edges(signal), right=True)
    return torch.bincount(bins, minlength=SCORE_BINS).int()


def compute_threshold(signal: str, counts: Tensor) -> float | None:
    """Return the 95th percentile, linear within its bin; the edge of an open bin; the default where nothing counts."""
    total = int(counts.sum())
    if not total:
        return DEFAULT_THRESHOLDS.get(signal)
    edges, wanted = list_bin_edges(signal).tolist(), QUANTILE * total
    summed = counts.double().cumsum(0)
    at = int((summed < wanted).sum())
    if at == 0 or at == SCORE_BINS - 1:
        return float(edges[0] if at == 0 else edges[-1])
    share = (wanted - float(summed[at - 1])) / float(counts[at])
    return float(edges[at - 1] + share * (edges[at] - edges[at - 1]))
