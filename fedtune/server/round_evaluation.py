"""What the server scores at the end of a round: the validation split in some rounds, the test split in the last one."""

from collections.abc import Mapping

from torch import Tensor

from fedtune import paths
from fedtune.server import scoring
from fedtune.server.round_commit import get_checkpoint_path
from fedtune.server.server_run import ServerRun
from fedtune.tracking import MetricRecord
from fedtune.wire.stored_state import StoredState

__all__ = ["end_early", "evaluate_round"]

SharedState = Mapping[str, Tensor]
Metrics = tuple[MetricRecord, ...]


def evaluate_round(run: ServerRun, state: SharedState, round_number: int) -> Metrics:
    """Return validation metrics of the rounds that are scored; after the last, also test metrics of start and end."""
    context = run.context
    metrics = scoring.validation(context, state, round_number) if scoring.scored_after(context, round_number) else ()
    metrics += scoring.score_border(context, state, round_number)
    if round_number == context.recipe.federation.rounds:
        metrics += _test(run, state)
    return metrics


def end_early(run: ServerRun, state: SharedState, round_number: int, metrics: Metrics) -> Metrics:
    """Return the metrics of a round; if the run ends early with it, they are those of a last round."""
    last = run.context.recipe.federation.rounds
    end = None if round_number == last else run.early_end.judge_round(round_number, metrics)
    if end is None:
        return metrics
    others = tuple(metric for metric in metrics if metric.split != "validation")
    return (*others, *scoring.validation(run.context, state, last), *_test(run, state), end)


def _test(run: ServerRun, state: SharedState) -> Metrics:
    start = StoredState(paths.get_runs_folder() / get_checkpoint_path(run.run_id, 0))
    return scoring.test(run.context, start, state)
