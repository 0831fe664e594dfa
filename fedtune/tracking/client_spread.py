"""How metrics vary between the clients of a round, each scored on its own held-out examples."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from fedtune.recipe.metric_names import LOWER_IS_BETTER
from fedtune.tracking.device_types import join_device_types
from fedtune.tracking.records import ClientScore, RoundRecord

__all__ = ["MOMENTS", "Spread", "compute_spreads"]

MOMENTS = ("before", "after", "shared")
"""When a client scores: before and after it trains, and once more the model that the round ended with."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One metric of a round over its clients, equally weighted. ``worst_tenth`` is the mean of the worst tenth.

    ``device_type`` is that of the devices that the clients scored on, as in ``cpu+cuda``; None if not known.
    """

    round: int
    moment: str
    name: str
    clients: int
    mean: float
    deviation: float
    worst_tenth: float
    device_type: str | None = None


def compute_spreads(rounds: Sequence[RoundRecord]) -> list[Spread]:
    """Summarise client scores by round, then ``before``, ``after`` or ``shared``, then name. NaN does not count."""
    found: dict[tuple[int, str, str], list[ClientScore]] = defaultdict(list)
    for record in rounds:
        for one in record.client_scores:
            if not math.isnan(one.value):
                found[record.number, one.moment, one.name].append(one)
    ordered = sorted(found, key=lambda key: (key[0], MOMENTS.index(key[1]), key[2]))
    return [_spread(key, found[key]) for key in ordered]


def _spread(key: tuple[int, str, str], scores: list[ClientScore]) -> Spread:
    number, moment, name = key
    values = [one.value for one in scores]
    mean = math.fsum(values) / len(values)
    tenth = sorted(values, reverse=name in LOWER_IS_BETTER)[: math.ceil(len(values) / 10)]
    return Spread(
        round=number,
        moment=moment,
        name=name,
        clients=len(values),
        mean=mean,
        deviation=math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values)),
        worst_tenth=math.fsum(tenth) / len(tenth),
        device_type=join_device_types(one.device_type for one in scores),
    )
