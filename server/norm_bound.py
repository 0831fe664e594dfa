"""No single update may be out of all proportion: its size is compared with the median of the cohort's.

What: an update's size is the root mean square of its values, so that device classes that train more or fewer tensors,
adapters of different ranks and masked weights compare. One above ``federation.norm_bound`` times the median is refused.
Updates of zeros do not count for the median. Where fewer than three clients sent one, the last that earlier rounds
merged count too; while there is nothing to compare with, nothing is refused.
The default, 50: honest clients of logistic regression whose data differ 450 to 1 in size, one epoch of SGD, reached 33.
Use when: always. A generous factor leaves honest updates alone, whose bits it does not touch.
Avoid when: the recipe asks for privacy, whose clip bounds each update; there it is off, since whether one client counts
would depend on the others.
Source: the median of the norms as a yardstick is that of FLAME (Nguyen et al., arXiv 2101.02281), which scales updates
down to it; a threshold for norms is norm thresholding (Sun et al., arXiv 1911.07963).
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median

from fedtune.contribution import Contribution
from fedtune.recipe import Recipe
from fedtune.tracking import ContributionRecord, RoundRecord

__all__ = ["NormBound", "largest_allowed"]

_COHORT = 3
"""Of fewer updates the median is no yardstick."""
_EARLIER = 6
"""So many norms of earlier rounds stand in."""


def largest_allowed(sizes: Sequence[float], earlier: Sequence[float], factor: float) -> float:
    """``factor`` times the median of the sizes that are not zero; infinite where there are none.

    ``earlier`` sizes, newest first, count where there are fewer than three of this round.
    """
    known = [size for size in sizes if size > 0]
    if len(known) < _COHORT:
        known += [size for size in earlier if size > 0]
    return factor * median(known) if known else math.inf


class NormBound:
    """The bound of one run; ``done`` are its committed rounds, so that a resumed run compares with the same."""

    def __init__(self, recipe: Recipe, done: Sequence[RoundRecord]) -> None:
        self._factor = recipe.federation.norm_bound if recipe.privacy is None else None
        self._earlier: deque[tuple[int, float]] = deque(maxlen=_EARLIER)
        for record in done:
            self.remember(record.contributions)

    def remember(self, records: Sequence[ContributionRecord]) -> None:
        """Take note of what a committed round merged."""
        self._earlier.extendleft((one.client, one.norm) for one in records if one.status == "merged")

    def kept(
        self,
        records: Sequence[ContributionRecord],
        contributions: Sequence[Contribution],
        values: Callable[[int], int],
    ) -> tuple[list[ContributionRecord], list[Contribution]]:
        """The records and contributions of a round, those beyond the bound refused; ``values`` counts a client's."""
        if self._factor is None:
            return list(records), list(contributions)
        sizes = {one.client: _size(one.norm, values(one.client)) for one in records if one.status == "merged"}
        few = sum(size > 0 for size in sizes.values()) < _COHORT
        earlier = [_size(norm, values(client)) for client, norm in self._earlier] if few else []
        most = largest_allowed(list(sizes.values()), earlier, self._factor)
        refused = {client: size / most * self._factor for client, size in sizes.items() if size > most}
        told = [self._refused(one, refused) for one in records]
        return told, [sent for sent in contributions if sent.client not in refused]

    def _refused(self, record: ContributionRecord, refused: Mapping[int, float]) -> ContributionRecord:
        if record.client not in refused:
            return record
        reason = (
            f"its values are {refused[record.client]:.3g} times as large as the median of the cohort's, and "
            f"federation.norm_bound allows {self._factor:g} times; check the device, or raise the bound"
        )
        return replace(record, status="refused", reason=reason, examples=0)


def _size(norm: float, values: int) -> float:
    return norm / math.sqrt(max(1, values))
