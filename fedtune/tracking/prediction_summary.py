"""Predicted memory beside what the clients of a run held, by device class."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedtune.recipe.versions import read_stored_recipe
from fedtune.tracking.records import ClientRecord, RoundRecord, RunRecord

__all__ = ["PredictionSummary", "summarise_predictions"]


@dataclass(frozen=True, kw_only=True)
class PredictionSummary:
    """The contributions of a device class whose settings were planned. Bytes are the largest of all.

    ``median_error`` is the median share by which a contribution held more anonymous memory than predicted, None if the
    system of the devices does not tell it. ``correction`` is the factor on predictions that the run was planned with,
    learned from earlier ones. Predictions are those before it.
    """

    device_class: str
    contributions: int
    predicted_anonymous: int
    predicted_total: int
    anonymous_memory: int | None
    peak_memory: int
    median_error: float | None
    correction: float


def summarise_predictions(run: RunRecord, rounds: Sequence[RoundRecord]) -> list[PredictionSummary]:
    """Return a summary of each device class that has a prediction, in the order of the clients."""
    planned = [
        one for record in rounds for one in record.client_records if one.predicted_anonymous and one.device_class
    ]
    corrections = _read_corrections(run)
    names = dict.fromkeys(one.device_class or "" for one in sorted(planned, key=lambda one: one.client))
    return [
        _summarise(name, [one for one in planned if one.device_class == name], corrections.get(name, 1.0))
        for name in names
    ]


def _read_corrections(run: RunRecord) -> dict[str, float]:
    """Return the factors that are stored with the run. Those of another form, of another version, are left out."""
    plans = read_stored_recipe(run.recipe).get("plans")
    found = plans.get("corrections") if isinstance(plans, Mapping) else None
    given = found.items() if isinstance(found, Mapping) else ()
    return {str(name): float(factor) for name, factor in given if isinstance(factor, int | float)}


def _summarise(name: str, records: Sequence[ClientRecord], correction: float) -> PredictionSummary:
    errors = [one.prediction_error for one in records if one.prediction_error is not None]
    return PredictionSummary(
        device_class=name,
        contributions=len(records),
        predicted_anonymous=max(one.predicted_anonymous or 0 for one in records),
        predicted_total=max(one.predicted_total or 0 for one in records),
        anonymous_memory=max(
            (one.anonymous_memory for one in records if one.anonymous_memory is not None), default=None
        ),
        peak_memory=max(one.peak_memory for one in records),
        median_error=statistics.median(errors) if errors else None,
        correction=correction,
    )
