"""What a round's merge is told of activations: measured here on validation inputs, or added up from clients."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from torch import Tensor

from fedtune import merging
from fedtune.contribution import Contribution
from fedtune.merging import Evidence, Measurement, Pipeline
from fedtune.seeds import derive
from fedtune.training import Workshop, load_state, processor_threads
from fedtune.training.activity import activity
from fedtune.training.calibration import few, inputs
from fedtune.training.told_activity import added_up, asked_activity

__all__ = ["evidence"]


def evidence(
    shop: Workshop,
    pipeline: Pipeline,
    state: Mapping[str, Tensor],
    number: int,
    names: Collection[str],
    contributions: Sequence[Contribution],
) -> Evidence:
    """Figures of the model as round ``number`` started it from ``state``, for the ``names`` trained in the round."""
    asked = merging.measurement(pipeline.steps)
    if asked is None:
        return Evidence(draw=number)
    batches = _validation(shop, asked) if asked.by == "server" or "batches" in pipeline.needs else []
    if "activity" not in pipeline.needs:
        return Evidence(model=shop.model, batches=batches, draw=number)
    if asked.by == "clients":
        extras = asked_activity(shop.model, shop.recipe, names)
        ordered = sorted(contributions, key=lambda one: one.client)
        found = added_up(shop.model, names, [one.read(extras) for one in ordered])
    else:
        load_state(shop.model, state)
        with processor_threads(shop.recipe.train.threads):
            found = activity(shop.model, batches, shop.techniques)
    return Evidence(activity=found, model=shop.model, batches=batches, draw=number)


def _validation(shop: Workshop, asked: Measurement) -> list[dict[str, Tensor]]:
    """Inputs without labels, the same in every round."""
    chosen = few(np.arange(len(shop.validation)), asked.examples, derive(shop.recipe.seed, "activity"))
    return list(inputs(shop.validation, chosen, shop.recipe.evaluation.batch))
