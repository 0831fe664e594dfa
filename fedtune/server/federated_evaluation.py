"""Metrics of a round on the held-out examples of clients: averaged, and per client."""

from collections.abc import Sequence
from typing import NamedTuple

from fedtune.tasks import Task
from fedtune.tracking import ClientScore, MetricRecord
from fedtune.tracking.device_types import join_device_types
from fedtune.wire.client_update import ClientUpdate, HoldoutMetrics

__all__ = ["ScoredClient", "average_holdout_metrics", "client_scores", "list_client_scores"]


class ScoredClient(NamedTuple):
    """A client, and the type of the device that it scores on; None if not known."""

    number: int
    device_type: str | None


def average_holdout_metrics(updates: Sequence[ClientUpdate], task: Task) -> tuple[MetricRecord, ...]:
    """Return means of the received model's metrics, weighted by predictions; empty without held-out examples."""
    scores = [one.holdout_metrics for one in updates if one.holdout_metrics is not None]
    total = sum(score.num_predictions for score in scores)
    if not total:
        return ()
    loss = sum(score.num_predictions * score.loss for score in scores) / total
    accuracy = sum(score.num_predictions * score.accuracy for score in scores) / total
    means = {"accuracy": accuracy, "loss": loss} if task.has_accuracy else {"loss": loss}
    device_type = join_device_types(one.device_type for one in updates if one.holdout_metrics is not None)
    return tuple(
        MetricRecord(split="local", domain="all", name=name, value=value, device_type=device_type)
        for name, value in means.items()
    )


def client_scores(updates: Sequence[ClientUpdate], metrics: Sequence[str], task: Task) -> tuple[ClientScore, ...]:
    """Return each client's metrics before and after training; none for a client without held-out examples.

    ``metrics`` are the names of the metrics besides loss and accuracy.
    """
    return tuple(
        figure
        for one in updates
        for moment, score in (("before", one.holdout_metrics), ("after", one.trained_metrics))
        if score is not None
        for figure in list_client_scores(ScoredClient(one.client, one.device_type), moment, score, metrics, task)
    )


def list_client_scores(
    client: ScoredClient, moment: str, score: HoldoutMetrics, metrics: Sequence[str], task: Task
) -> list[ClientScore]:
    """Return a client's metrics at one moment: before or after training, or of the shared state."""
    basic = {"loss": score.loss, "accuracy": score.accuracy} if task.has_accuracy else {"loss": score.loss}
    found = basic | dict(zip(metrics, score.more, strict=False))
    return [
        ClientScore(
            client=client.number,
            moment=moment,
            name=name,
            value=value,
            num_predictions=score.num_predictions,
            device_type=client.device_type,
        )
        for name, value in found.items()
    ]
