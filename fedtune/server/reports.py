"""Check every field of a client's report before it is stored or used."""

import math
from typing import Annotated, Any

from flwr.app import MetricRecord
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from fedtune.errors import ClientUpdateError
from fedtune.recipe.validation_errors import explain_validation_error
from fedtune.untrusted import clean_text
from fedtune.wire.client_update import DEVICE_TYPES, ClientReport

__all__ = ["MOST_EXAMPLES", "read_report", "read_score"]

MOST_EXAMPLES = 10**9
"""The largest number of examples in a round. At a million per second, this takes a quarter of an hour."""
_MOST_BYTES = 2**50
_MOST_SECONDS = 10.0**7
_MOST_LOSS = 1e30
_MOST_FIGURES = 64
_MOST_TASKS = 1000
_MOST_PLANS = 10_000


def _not_infinite(value: float) -> float:
    if math.isinf(value) or abs(value) > _MOST_LOSS:
        raise ValueError(f"it must lie between -{_MOST_LOSS:g} and {_MOST_LOSS:g}")
    return value


_Loss = Annotated[float, AfterValidator(_not_infinite)]
_Bytes = Annotated[int, Field(ge=0, le=_MOST_BYTES)]
_Predictions = Annotated[int, Field(ge=0, le=_MOST_BYTES)]
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Bounded(BaseModel):
    """The fields of :class:`ClientReport` with plausible bounds. Only a loss may be NaN, if it is not reported."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    num_examples: int = Field(ge=1, le=MOST_EXAMPLES)
    loss: _Loss
    seconds: float = Field(ge=0, le=_MOST_SECONDS, allow_inf_nan=False)
    activation_memory: _Bytes
    peak_memory: _Bytes
    num_holdout_predictions: int = Field(ge=0, le=_MOST_BYTES)
    holdout_loss: float = Field(ge=-_MOST_LOSS, le=_MOST_LOSS, allow_inf_nan=False)
    holdout_accuracy: float = Field(ge=0, le=1, allow_inf_nan=False)
    micro_batch_size: int | None = Field(None, ge=1, le=MOST_EXAMPLES)
    device_code: int | None = Field(None, ge=0, lt=len(DEVICE_TYPES))
    accelerator_memory: _Bytes | None = None
    accelerator_reserved: _Bytes | None = None
    extra_holdout_metrics: list[_Loss] = Field(max_length=_MOST_FIGURES)
    trained_holdout_metrics: list[_Loss] = Field(max_length=_MOST_FIGURES)
    task_predictions: list[_Predictions] | None = Field(None, max_length=_MOST_TASKS)
    task_accuracies: list[_Share] | None = Field(None, max_length=_MOST_TASKS)
    task_losses: list[_Loss] | None = Field(None, max_length=_MOST_TASKS)
    stored_bytes: _Bytes | None = None
    anonymous_memory: _Bytes | None = None
    file_memory: _Bytes | None = None
    plan_number: int | None = Field(None, ge=0, le=_MOST_PLANS)
    drift_score: float | None = Field(None, ge=-_MOST_LOSS, le=_MOST_LOSS, allow_inf_nan=False)
    drift_examples: int | None = Field(None, ge=1, le=MOST_EXAMPLES)

    @field_validator("trained_holdout_metrics")
    @classmethod
    def _whole(cls, figures: list[float]) -> list[float]:
        if len(figures) == 1:
            raise ValueError("it must be empty, or begin with a loss and an accuracy")
        return figures


class _OfScoring(_Bounded):
    """The report of a client that only scored and did not train."""

    num_examples: int = Field(ge=0, le=0)


def read_report(record: MetricRecord | None, most_examples: int = MOST_EXAMPLES, num_tasks: int = 0) -> ClientReport:
    """Return the report in a reply; raise ClientUpdateError if a field is missing or out of bounds.

    ``most_examples`` is the largest number of examples that the client can have trained on in the round, ``num_tasks``
    the number of distinct tasks of the stream.
    """
    bounded = _checked(record, _Bounded)
    if bounded.num_examples > most_examples:
        raise ClientUpdateError(
            f"its report counts {bounded.num_examples} examples, but of what the device declared it can have trained "
            f"on {most_examples} at most"
        )
    return _require_tasks(ClientReport(**bounded.model_dump()), num_tasks)


def read_score(record: MetricRecord | None, num_tasks: int = 0) -> ClientReport:
    """Return the report of a client that only scored. It has no scores of too few held-out examples.

    Raise ClientUpdateError as ``read_report`` does.
    """
    return _require_tasks(ClientReport(**_checked(record, _OfScoring).model_dump()), num_tasks)


def _require_tasks(report: ClientReport, num_tasks: int) -> ClientReport:
    """Raise ClientUpdateError if a report tells of other tasks than the stream has."""
    lists = report.task_predictions, report.task_accuracies, report.task_losses
    lengths = {-1 if one is None else len(one) for one in lists}
    if lengths not in ({-1}, {num_tasks} if num_tasks else {-1}):
        raise ClientUpdateError(
            f"its report has scores of {max(lengths)} tasks, and the stream has {num_tasks}; update the client"
        )
    return report


def _checked(record: MetricRecord | None, kind: type[_Bounded]) -> _Bounded:
    if record is None:
        raise ClientUpdateError("the reply carries no report; update the client")
    fields: dict[str, Any] = dict(record)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        sentence = clean_text(explain_validation_error(error, kind, "its report"))
        raise ClientUpdateError(f"{sentence}; update the client") from error
