"""A round's merge context holds activation statistics, measured on validation inputs or uploaded by clients."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from torch import Tensor

from fedtune import merging
from fedtune.data.sampling import iter_inputs, sample_rows
from fedtune.merging import CalibrationRequest, MergeContext, MergePipeline, measure_activation_statistics
from fedtune.seeds import derive_seed
from fedtune.training import RunContext, set_model_state, use_cpu_threads
from fedtune.training.uploaded_statistics import declare_uploaded_statistics, sum_uploaded_statistics
from fedtune.wire.client_update import ClientUpdate

__all__ = ["make_merge_context"]


def make_merge_context(
    context: RunContext,
    pipeline: MergePipeline,
    state: Mapping[str, Tensor],
    round_number: int,
    names: Collection[str],
    contributions: Sequence[ClientUpdate],
) -> MergeContext:
    """Build a round's merge context for the ``names`` trained in it; the round started from ``state``."""
    request = merging.build_calibration_request(pipeline.steps)
    if request is None:
        return MergeContext(round_number=round_number)
    batches = _validation(context, request) if request.calibrate_on == "server" or "batches" in pipeline.needs else []
    if "activity" not in pipeline.needs:
        return MergeContext(model=context.model, calibration_batches=batches, round_number=round_number)
    if request.calibrate_on == "clients":
        extras = declare_uploaded_statistics(context.model, context.recipe, names)
        ordered = sorted(contributions, key=lambda one: one.client)
        found = sum_uploaded_statistics(context.model, names, [one.read_tensors(extras) for one in ordered])
    else:
        set_model_state(context.model, state)
        with use_cpu_threads(context.recipe.train.threads):
            found = measure_activation_statistics(context.model, batches, context.techniques)
    return MergeContext(
        activation_statistics=found, model=context.model, calibration_batches=batches, round_number=round_number
    )


def _validation(context: RunContext, request: CalibrationRequest) -> list[dict[str, Tensor]]:
    """Return validation inputs without labels. They are the same in every round."""
    chosen = sample_rows(
        np.arange(len(context.validation)), request.calibration_examples, derive_seed(context.recipe.seed, "activity")
    )
    return list(iter_inputs(context.validation, chosen, context.recipe.evaluation.batch_size))
