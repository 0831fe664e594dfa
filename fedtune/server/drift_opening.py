"""Open the tasks that drift alarms have opened in committed rounds, in the run context and in train requests."""

from collections.abc import Sequence

from fedtune.server.drift_watch import SPLIT
from fedtune.tracking import MetricRecord, RoundRecord
from fedtune.training import RunContext, set_run_context

__all__ = ["list_opened_rounds", "open_task", "reopen_tasks"]


def list_opened_rounds(metrics: Sequence[MetricRecord]) -> list[int]:
    """Return the rounds that end a task early, as the metrics of a committed round say."""
    return [int(one.value) for one in metrics if (one.split, one.domain, one.name) == (SPLIT, "all", "opens")]


def reopen_tasks(context: RunContext, done: Sequence[RoundRecord]) -> None:
    """Open the tasks that were opened before the run was resumed."""
    for record in done:
        for last_round in list_opened_rounds(record.metrics):
            open_task(context, last_round)


def open_task(context: RunContext, last_round: int) -> None:
    """Let the task that is running end with a round, and a new one begin after it."""
    for each in (context, *context.by_device_class.values()):
        each.open_task(last_round)
    set_run_context(context)  # clients in this process find it by the new recipe
