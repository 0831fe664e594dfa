"""How good a round found the model on what clients held out: one figure over the predictions of all of them."""

from collections.abc import Sequence

from fedtune.contribution import Contribution
from fedtune.tracking import MetricRecord

__all__ = ["own_scores"]


def own_scores(contributions: Sequence[Contribution]) -> tuple[MetricRecord, ...]:
    """Means by predictions, of the model as the round began it; nothing when no client held anything out."""
    scores = [one.own for one in contributions]
    total = sum(score.predictions for score in scores)
    if not total:
        return ()
    means = {
        "accuracy": sum(score.predictions * score.accuracy for score in scores) / total,
        "loss": sum(score.predictions * score.loss for score in scores) / total,
    }
    return tuple(MetricRecord(part="own", domain="all", name=name, value=value) for name, value in means.items())
