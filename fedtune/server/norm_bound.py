"""Refuse client updates that are much larger than the median of their cohort.

What: the size of an update is the root mean square of its values. It is therefore comparable between device classes
that train different tensors, between adapters of different ranks, and for masked weights. An update is refused if its
size is above ``federation.norm_bound`` times the reference size. The reference size is the median size of the round, or
that of an earlier round if it was larger: late in a run, most updates are small, but a new client may send one as large
as those at the start. Updates of zeros do not count. With fewer than three updates, the median is not used. While there
is no reference size, only updates above 10,000 are refused, which no weight of a network reaches. The median of each
round is in the store (split ``updates``, name ``median_rms``), so that a resumed run uses the same reference sizes.
The default is 50. Honest clients of a logistic regression, whose data sizes differ by a factor of 450, sent updates of
at most 33 times the median after one epoch of SGD.
Use when: always. With a large factor, honest updates pass, and their bits do not change.
Avoid when: the recipe has privacy. The clipping norm bounds each update then. This bound is off, because it would make
the weight of a client depend on the others.
Source: FLAME (Nguyen et al., arXiv 2101.02281) also uses the median of the norms, and scales larger updates down to it.
A threshold for norms is norm thresholding (Sun et al., arXiv 1911.07963).
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
"""The smallest number of updates whose median is used."""
_LARGEST = 1e4
"""The largest size of an update without a reference size."""
_SPLIT, _NAME = "updates", "median_rms"


def median_size(sizes: Iterable[float]) -> float:
    """Return the median of the sizes that are not zero; 0 if there are none."""
    return median([size for size in sizes if size > 0] or [0.0])


def yardstick(sizes: Sequence[float], earlier: float) -> float:
    """Return the reference size for the ``sizes`` of a round's updates; infinite if there is none.

    ``earlier`` is the largest median of earlier rounds, or 0.
    """
    now = median_size(sizes) if sum(size > 0 for size in sizes) >= _COHORT else 0.0
    return max(now, earlier) or math.inf


class NormBound:
    """The norm bound of one run. ``done`` are its committed rounds."""

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
        """Return the records and the client updates of a round. Updates above the bound are refused.

        ``values`` returns the number of values in a client's update.
        """
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
        """Return the round's median size as a metric, and use it as a reference size in later rounds."""
        if not self._median:
            return ()
        self._earlier = max(self._earlier, self._median)
        return (MetricRecord(split=_SPLIT, domain="all", name=_NAME, value=self._median),)

    def _why(self, size: float, unit: float) -> str:
        if unit < math.inf and size > unit * (self._factor or math.inf):
            return (
                f"its values are {size / unit:.3g} times as large as the median of the cohort, but "
                f"federation.norm_bound allows a factor of {self._factor:g}; check the device, or raise the bound"
            )
        return f"its values are {size:.3g} on average, too large for weights; check the device and its learning rate"


def _refused(record: ClientRecord, refused: Mapping[int, str]) -> ClientRecord:
    if record.client not in refused:
        return record
    return replace(record, status="rejected", reason=refused[record.client], num_examples=0)


def _is_median(metric: MetricRecord) -> bool:
    return (metric.split, metric.name) == (_SPLIT, _NAME)


def _size(norm: float, values: int) -> float:
    return norm / math.sqrt(max(1, values))
