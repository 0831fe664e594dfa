"""Scores of a model on a client's held-out examples of each task of a stream that the client has begun."""

from fedtune import continual
from fedtune.training.client_round import ClientRound
from fedtune.training.evaluation import score_held_out
from fedtune.wire.task_figures import NOT_REPORTED, TaskFigures

__all__ = ["score_task_holdouts"]


def score_task_holdouts(client: ClientRound) -> TaskFigures | None:
    """Score the client's model on the held-out rows of each task; None without a stream or without such rows."""
    stream = client.stream
    if stream is None or not stream.holdouts:
        return None
    told = [NOT_REPORTED] * stream.num_tasks
    for one in stream.holdouts:
        with continual.mask_classes(client.model, one.classes, stream.num_labels):
            score = score_held_out(client, one.rows.tolist())
        told[one.task] = score.num_predictions, score.accuracy, score.loss
    return TaskFigures.from_tasks(told)
