"""What clients add to their updates for the drift signal: their part of the reference, or the counts of scores."""

from fedtune.continual import find_last_layer
from fedtune.continual._drift_phases import DRIFT_PREFIX, SCORED_BATCHES, find_phase
from fedtune.continual._drift_reference import declare_reference
from fedtune.continual._drift_threshold import SCORE_BINS
from fedtune.training.run_context import RunContext
from fedtune.wire.client_update import TensorSpec

__all__ = ["declare_drift_upload"]


def declare_drift_upload(context: RunContext, round_number: int) -> dict[str, TensorSpec]:
    """Return what clients add to their updates in a round for the drift signal."""
    plan, phase = context.stream_plan, None
    if plan is not None and plan.stream.drift is not None:
        phase = find_phase(plan, round_number)
    if plan is None or plan.stream.drift is None or phase is None:
        return {}
    if phase == "threshold":
        return {f"{DRIFT_PREFIX}scores": TensorSpec((SCORE_BINS,), "I32", SCORED_BATCHES + 1)}
    num_labels = len(context.corpus.label_names)
    width = int(find_last_layer(context.model, num_labels).get_parameter("weight").shape[1])
    declared = declare_reference(plan.stream.drift.signal, width, num_labels)
    return {f"{DRIFT_PREFIX}{name}": form for name, form in declared.items()}
