"""RESCALE: give the pre-activations of a merged net the averaged deviations of its input models; means scale along.

What: z <- sigma* z / sigma for each channel, layer by layer, merged into weights and biases (b <- g b).
Memory: one model in addition to the merged model and its input models; sums per channel.
Use when: as repair, for deep nets without norms, or for layers without a bias.
Avoid when: nets have few layers; repair was better there.
Source: Qu & Horvath (arXiv 2402.05966), where it comes before REPAIR; see ``_renormalise``.
"""

from typing import ClassVar

from fedtune.merging.renormalise._moment_step import MomentRenormaliseStep

__all__ = ["Rescale"]


class Rescale(MomentRenormaliseStep):
    """Matches deviations."""

    name: ClassVar[str] = "rescale"
    matches_std: ClassVar[bool] = True
    matches_mean: ClassVar[bool] = False
