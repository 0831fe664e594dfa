"""RESHIFT: give the pre-activations of a merged net the averaged means of its input models; deviations stay.

What: z <- z - mu + mu* for each channel, layer by layer, merged into biases.
Memory: one model in addition to the merged model and its input models; sums per channel.
Use when: you need a control for repair and rescale.
Avoid when: you want a good merge. It was worse than no correction in nearly every case measured: the part of the signal
that depends on the input is weak, and the offsets then dominate.
Source: Qu & Horvath (arXiv 2402.05966); see ``_renormalise``.
"""

from typing import ClassVar

from fedtune.merging.renormalise._moment_step import MomentRenormaliseStep

__all__ = ["Reshift"]


class Reshift(MomentRenormaliseStep):
    """Matches means."""

    name: ClassVar[str] = "reshift"
    matches_std: ClassVar[bool] = False
    matches_mean: ClassVar[bool] = True
