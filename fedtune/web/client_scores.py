"""The scores of clients on their own held-out examples in the newest round that has any, as a strip of dots."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedtune.recipe.metric_names import LOWER_IS_BETTER
from fedtune.tracking import ClientScore
from fedtune.tracking.client_spread import MOMENTS

__all__ = ["ScoreStrip", "summarise_scores"]


@dataclass(frozen=True, kw_only=True)
class ScoreStrip:
    """One metric at one moment. ``dots`` are places in percent between the lowest and the highest of the metric."""

    round: int
    moment: str
    name: str
    clients: int
    mean: float
    worst_tenth: float
    low: float
    high: float
    dots: Sequence[float]


def summarise_scores(number: int, scores: Sequence[ClientScore]) -> list[ScoreStrip]:
    """Summarise the scores of round ``number`` by metric and moment. All clients weigh the same; NaN does not count."""
    known = [one for one in scores if math.isfinite(one.value)]
    keys = sorted({(one.name, one.moment) for one in known}, key=lambda key: (key[0], MOMENTS.index(key[1])))
    return [_summarise(number, key, known) for key in keys]


def _summarise(number: int, key: tuple[str, str], scores: Sequence[ClientScore]) -> ScoreStrip:
    name, moment = key
    every = [one.value for one in scores if one.name == name]
    values = sorted((one.value for one in scores if (one.name, one.moment) == key), reverse=name in LOWER_IS_BETTER)
    low, high = min(every), max(every)
    tenth = values[: math.ceil(len(values) / 10)]
    return ScoreStrip(
        round=number,
        moment=moment,
        name=name,
        clients=len(values),
        mean=math.fsum(values) / len(values),
        worst_tenth=math.fsum(tenth) / len(tenth),
        low=low,
        high=high,
        dots=[100 * (one - low) / (high - low) if high > low else 50.0 for one in values],
    )
