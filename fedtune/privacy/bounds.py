"""How large things may be under a recipe's privacy: the noise that fits the clipping, the norms that are believed."""

import math

from fedtune.privacy.clip import SLACK
from fedtune.recipe import Privacy

__all__ = ["deviation", "largest_norm"]

_TAIL = 8.0


def deviation(privacy: Privacy) -> float:
    """Standard deviation of the noise on a sum of contributions: ``noise`` times what one of them can change."""
    return privacy.noise * privacy.clip * (1 + SLACK)


def largest_norm(privacy: Privacy, elements: int) -> float:
    """The norm up to which a contribution of so many elements is believed to be clipped as asked.

    With noise of its own, |delta + noise| <= clip + deviation * (sqrt(elements) + 8) but for one in 1e13: the norm is a
    1-Lipschitz function of Gaussian numbers, so it passes its mean by t deviations with at most exp(-t^2 / 2).
    """
    bound = privacy.clip * (1 + SLACK)
    if privacy.where == "server":
        return bound
    return bound + deviation(privacy) * (math.sqrt(elements) + _TAIL)
