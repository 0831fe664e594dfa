"""RESCALE: deviations of a merged net's pre-activations become the average of its ends'; means are scaled along.

What: z <- sigma* z / sigma for each channel, layer by layer, folded into weights and biases (b <- g b).
Memory: one model beside the merged one and its ends; sums per channel.
Use when: as repair, on deep nets without norms, or where layers have no bias.
Avoid when: nets of few layers; repair was better there.
Source: Qu & Horvath (arXiv 2402.05966), where it goes before REPAIR; see ``_renormalise``.
"""

from typing import ClassVar

from fedtune.merging._renormalise import MomentRenormaliseStep

__all__ = ["Rescale"]


class Rescale(MomentRenormaliseStep):
    """Deviations."""

    name: ClassVar[str] = "rescale"
    matches_std: ClassVar[bool] = True
    matches_mean: ClassVar[bool] = False
