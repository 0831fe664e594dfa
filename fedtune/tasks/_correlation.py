"""Correlations of predicted numbers with labels."""

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["correlate"]


def correlate(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Pearson's and Spearman's correlation of predictions with labels; NaN where one side does not vary."""
    from scipy.stats import pearsonr, spearmanr

    predicted, wanted = np.array(pairs, np.float64).reshape(-1, 2).T
    if len(predicted) < 2 or np.ptp(predicted) == 0 or np.ptp(wanted) == 0:
        return {"pearson": math.nan, "spearman": math.nan}
    return {
        "pearson": float(pearsonr(predicted, wanted).statistic),
        "spearman": float(spearmanr(predicted, wanted).statistic),
    }
