"""The noise scale and the largest accepted norm of a client update under a recipe's privacy settings."""

import math

from fedtune.privacy.clipping import ROUNDING_SLACK
from fedtune.recipe.schema import PrivacySettings

__all__ = ["compute_max_update_norm", "compute_mean_noise_std", "compute_noise_std"]

_TAIL = 8.0


def compute_noise_std(privacy: PrivacySettings) -> float:
    """Return the standard deviation of the noise on a sum of client updates: ``noise_multiplier`` times the
    sensitivity.
    """
    return privacy.noise_multiplier * privacy.clipping_norm * (1 + ROUNDING_SLACK)


def compute_mean_noise_std(privacy: PrivacySettings, count: int) -> float:
    """Return the standard deviation of the noise on the mean of ``count`` client updates.

    Each update changes the mean by at most clipping_norm / count. Rounding the mean to fp32 before adding noise may add
    2^-23 of the clipping norm.
    """
    return compute_noise_std(privacy) * (1 / count + 2.0**-23)


def compute_max_update_norm(privacy: PrivacySettings, elements: int) -> float:
    """Return the largest norm that is accepted for a clipped client update of ``elements`` elements.

    If clients add noise, |delta + noise| <= clipping_norm + std * (sqrt(elements) + 8), except with probability 1e-13.
    The norm is a 1-Lipschitz function of Gaussian variables, so it exceeds its mean by t standard deviations with
    probability at most exp(-t^2 / 2).
    """
    bound = privacy.clipping_norm * (1 + ROUNDING_SLACK)
    if privacy.noise_added_by == "server":
        return bound
    return bound + compute_noise_std(privacy) * (math.sqrt(elements) + _TAIL)
