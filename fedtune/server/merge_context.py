"""What a round's merge is told of activations: measured here on validation inputs, or added up from clients."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from torch import Tensor

from fedtune import merging
from fedtune.data.sampling import iter_inputs, sample_rows
from fedtune.merging import CalibrationRequest, MergeContext, MergePipeline
from fedtune.seeds import derive_seed
from fedtune.training import RunContext, set_model_state, use_cpu_threads
from fedtune.training.activation_statistics import measure_activation_statistics
from fedtune.training.uploaded_statistics import declare_uploaded_statistics, sum_uploaded_statistics
from fedtune.wire.client_update import ClientUpdate

__all__ = ["make_merge_context"]


def make_merge_context(
    shop: RunContext,
    pipeline: MergePipeline,
    state: Mapping[str, Tensor],
    number: int,
    names: Collection[str],
    contributions: Sequence[ClientUpdate],
) -> MergeContext:
    """Figures of the model as round ``number`` started it from ``state``, for the ``names`` trained in the round."""
    asked = merging.build_calibration_request(pipeline.steps)
    if asked is None:
        return MergeContext(round_number=number)
    batches = _validation(shop, asked) if asked.calibrate_on == "server" or "batches" in pipeline.needs else []
    if "activity" not in pipeline.needs:
        return MergeContext(model=shop.model, calibration_batches=batches, round_number=number)
    if asked.calibrate_on == "clients":
        extras = declare_uploaded_statistics(shop.model, shop.recipe, names)
        ordered = sorted(contributions, key=lambda one: one.client)
        found = sum_uploaded_statistics(shop.model, names, [one.read_tensors(extras) for one in ordered])
    else:
        set_model_state(shop.model, state)
        with use_cpu_threads(shop.recipe.train.threads):
            found = measure_activation_statistics(shop.model, batches, shop.techniques)
    return MergeContext(activation_statistics=found, model=shop.model, calibration_batches=batches, round_number=number)


def _validation(shop: RunContext, asked: CalibrationRequest) -> list[dict[str, Tensor]]:
    """Inputs without labels, the same in every round."""
    chosen = sample_rows(
        np.arange(len(shop.validation)), asked.calibration_examples, derive_seed(shop.recipe.seed, "activity")
    )
    return list(iter_inputs(shop.validation, chosen, shop.recipe.evaluation.batch_size))
