"""How large things may be under a recipe's privacy: the noise that fits the clipping, the norms that are believed."""

import math

from fedtune.privacy.clipping import ROUNDING_SLACK
from fedtune.recipe.schema import PrivacySettings

__all__ = ["compute_max_update_norm", "compute_mean_noise_std", "compute_noise_std"]

_TAIL = 8.0


def compute_noise_std(privacy: PrivacySettings) -> float:
    """Standard deviation of the noise on a sum of contributions: ``noise`` times what one of them can change."""
    return privacy.noise_multiplier * privacy.clipping_norm * (1 + ROUNDING_SLACK)


def compute_mean_noise_std(privacy: PrivacySettings, count: int) -> float:
    """Standard deviation of the noise on the mean of so many contributions.

    Each moves the mean by clip / count; rounding the mean to fp32 before the noise may add 2^-23 of clip.
    """
    return compute_noise_std(privacy) * (1 / count + 2.0**-23)


def compute_max_update_norm(privacy: PrivacySettings, elements: int) -> float:
    """The norm up to which a contribution of so many elements is believed to be clipped as asked.

    With noise of its own, |delta + noise| <= clip + deviation * (sqrt(elements) + 8) but for one in 1e13: the norm is a
    1-Lipschitz function of Gaussian numbers, so it passes its mean by t deviations with at most exp(-t^2 / 2).
    """
    bound = privacy.clipping_norm * (1 + ROUNDING_SLACK)
    if privacy.noise_added_by == "server":
        return bound
    return bound + compute_noise_std(privacy) * (math.sqrt(elements) + _TAIL)
