"""RESHIFT: means of a merged net's pre-activations become the average of its ends'; deviations stay.

What: z <- z - mu + mu* for each channel, layer by layer, folded into biases.
Memory: one model beside the merged one and its ends; sums per channel.
Use when: as a control beside repair and rescale.
Avoid when: a good merge is wanted. It was worse than nothing in nearly every case measured: the part of the signal that
depends on the input has faded, and offsets then rule.
Source: Qu & Horvath (arXiv 2402.05966); see ``_renormalise``.
"""

from typing import ClassVar

from fedtune.merging._renormalise import MomentRenormaliseStep

__all__ = ["Reshift"]


class Reshift(MomentRenormaliseStep):
    """Means."""

    name: ClassVar[str] = "reshift"
    matches_std: ClassVar[bool] = False
    matches_mean: ClassVar[bool] = True
