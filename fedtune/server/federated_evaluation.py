"""How good a round found the model on what clients held out: over all of them, and client by client."""

from collections.abc import Sequence

from fedtune.tracking import ClientScore, MetricRecord
from fedtune.wire.client_update import ClientUpdate, HoldoutMetrics

__all__ = ["average_holdout_metrics", "client_scores", "figures_of"]


def average_holdout_metrics(contributions: Sequence[ClientUpdate]) -> tuple[MetricRecord, ...]:
    """Means by predictions, of the model as the round began it; nothing when no client held anything out."""
    scores = [one.holdout_metrics for one in contributions if one.holdout_metrics is not None]
    total = sum(score.num_predictions for score in scores)
    if not total:
        return ()
    means = {
        "accuracy": sum(score.num_predictions * score.accuracy for score in scores) / total,
        "loss": sum(score.num_predictions * score.loss for score in scores) / total,
    }
    return tuple(MetricRecord(split="local", domain="all", name=name, value=value) for name, value in means.items())


def client_scores(contributions: Sequence[ClientUpdate], metrics: Sequence[str]) -> tuple[ClientScore, ...]:
    """Each client's figures before and after it trained; ``metrics`` are the names of those beyond loss and accuracy.

    A client that held nothing out has none.
    """
    return tuple(
        figure
        for one in contributions
        for moment, score in (("before", one.holdout_metrics), ("after", one.trained_metrics))
        if score is not None
        for figure in figures_of(one.client, moment, score, metrics)
    )


def figures_of(client: int, moment: str, score: HoldoutMetrics, metrics: Sequence[str]) -> list[ClientScore]:
    """A client's figures at one moment."""
    figures = {"loss": score.loss, "accuracy": score.accuracy} | dict(zip(metrics, score.more, strict=False))
    return [
        ClientScore(client=client, moment=moment, name=name, value=value, num_predictions=score.num_predictions)
        for name, value in figures.items()
    ]
