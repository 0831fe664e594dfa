"""No single update may be out of all proportion: its size is compared with the median of the cohort's.

What: an update's size is the root mean square of its values, so that device classes that train more or fewer tensors,
adapters of different ranks and masked weights compare. One above ``federation.norm_bound`` times the yardstick is
refused. The yardstick is the median size of the round, or of an earlier round where that was larger: once most clients
have little left to learn, the one that still has may send what all sent at the start. Updates of zeros do not count,
and of fewer than three updates the median is no yardstick; while there is none, an update is refused only where its
size is above 10,000, which no weight of a network reaches. Each round's median is in the store (split ``updates``,
name ``median_rms``), so that a resumed run compares with the same.
The default, 50: honest clients of logistic regression whose data differ 450 to 1 in size, one epoch of SGD, reached 33.
Use when: always. A generous factor leaves honest updates alone, whose bits it does not touch.
Avoid when: the recipe asks for privacy, whose clip bounds each update; there it is off, since whether one client counts
would depend on the others.
Source: the median of the norms as a yardstick is that of FLAME (Nguyen et al., arXiv 2101.02281), which scales updates
down to it; a threshold for norms is norm thresholding (Sun et al., arXiv 1911.07963).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import median

from fedtune.recipe.schema import Recipe
from fedtune.tracking import ClientRecord, MetricRecord, RoundRecord
from fedtune.wire.client_update import ClientUpdate

__all__ = ["NormBound", "median_size", "yardstick"]

_COHORT = 3
"""Of fewer updates the median is no yardstick."""
_LARGEST = 1e4
"""Above this an update's size is no weight's, whatever it is compared with."""
_SPLIT, _NAME = "updates", "median_rms"


def median_size(sizes: Iterable[float]) -> float:
    """The median of the sizes that are not zero; 0 where there are none."""
    return median([size for size in sizes if size > 0] or [0.0])


def yardstick(sizes: Sequence[float], earlier: float) -> float:
    """What the ``sizes`` of a round's updates are measured by; infinite where there is nothing to measure by.

    ``earlier`` is the largest median of the rounds before, 0 where there was none.
    """
    now = median_size(sizes) if sum(size > 0 for size in sizes) >= _COHORT else 0.0
    return max(now, earlier) or math.inf


class NormBound:
    """The bound of one run; ``done`` are its committed rounds."""

    def __init__(self, recipe: Recipe, done: Sequence[RoundRecord]) -> None:
        self._factor = recipe.federation.norm_bound if recipe.privacy is None else None
        told = [metric.value for record in done for metric in record.metrics if _is_median(metric)]
        self._earlier = max(told, default=0.0)
        self._median = 0.0

    def refuse_large_updates(
        self,
        records: Sequence[ClientRecord],
        contributions: Sequence[ClientUpdate],
        values: Callable[[int], int],
    ) -> tuple[list[ClientRecord], list[ClientUpdate]]:
        """The records and contributions of a round, those beyond the bound refused; ``values`` counts a client's."""
        if self._factor is None:
            return list(records), list(contributions)
        sizes = {one.client: _size(one.update_norm, values(one.client)) for one in records if one.status == "merged"}
        unit = yardstick(list(sizes.values()), self._earlier)
        limit = min(unit * self._factor, max(_LARGEST, self._earlier * self._factor))
        refused = {client: self._why(size, unit) for client, size in sizes.items() if size > limit}
        self._median = median_size(size for client, size in sizes.items() if client not in refused)
        told = [_refused(one, refused) for one in records]
        return told, [sent for sent in contributions if sent.client not in refused]

    def record_median_norm(self) -> tuple[MetricRecord, ...]:
        """The round's median size, once its updates are merged; rounds to come compare with it too."""
        if not self._median:
            return ()
        self._earlier = max(self._earlier, self._median)
        return (MetricRecord(split=_SPLIT, domain="all", name=_NAME, value=self._median),)

    def _why(self, size: float, unit: float) -> str:
        if unit < math.inf and size > unit * (self._factor or math.inf):
            return (
                f"its values are {size / unit:.3g} times as large as the median of the cohort's, and "
                f"federation.norm_bound allows {self._factor:g} times; check the device, or raise the bound"
            )
        return f"its values are {size:.3g} on average, which no weights are; check the device and its learning rate"


def _refused(record: ClientRecord, refused: Mapping[int, str]) -> ClientRecord:
    if record.client not in refused:
        return record
    return replace(record, status="rejected", reason=refused[record.client], num_examples=0)


def _is_median(metric: MetricRecord) -> bool:
    return (metric.split, metric.name) == (_SPLIT, _NAME)


def _size(norm: float, values: int) -> float:
    return norm / math.sqrt(max(1, values))
