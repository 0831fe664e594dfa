"""What earlier contributions teach about the predicted memory of a device class. Nothing here imports torch."""

import statistics
from collections.abc import Mapping, Sequence

from fedtune.recipe.memory_plans import LARGEST_CORRECTION

__all__ = ["learn_corrections"]

_FEWEST_CONTRIBUTIONS = 3


def learn_corrections(errors: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the factor on predicted memory of each device class that held more than predicted, by the median error.

    ``errors`` are shares by which contributions held more. A class that held less keeps its predictions: they are for
    the largest batch, and its data may have been shorter than that.
    """
    medians = {name: statistics.median(found) for name, found in errors.items() if len(found) >= _FEWEST_CONTRIBUTIONS}
    factors = {name: min(LARGEST_CORRECTION, round(1 + median, 4)) for name, median in medians.items()}
    return {name: factor for name, factor in sorted(factors.items()) if factor > 1}
