"""Map an error on a device to the problem that it may report to the server."""

import errno

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from fedtune.errors import (
    ClientUpdateError,
    DataError,
    FedtuneError,
    MemoryBudgetError,
    ModelError,
    RecipeError,
    SourceError,
    StoreError,
)
from fedtune.recipe.validation_errors import UNIT_UNAVAILABLE
from fedtune.wire.protocol_codes import Problem

__all__ = ["problem_of"]

_CODES: tuple[tuple[type[BaseException], str], ...] = (
    (MemoryBudgetError, "memory-short"),
    (ClientUpdateError, "privacy-broken"),
    (DataError, "data-unfit"),
    (ModelError, "model-unfit"),
    (RecipeError, "recipe-unknown"),
    (SourceError, "source-unreadable"),
    (StoreError, "disk-failed"),
    (ValidationError, "recipe-unknown"),
    (MemoryError, "memory-short"),
    (FileNotFoundError, "source-unreadable"),
)
"""The first match counts. Other errors are ``code-failed``."""


def problem_of(error: BaseException) -> Problem:
    """Return the code of an error and its counts, but never its text."""
    if isinstance(error, FedtuneError) and error.code:
        return Problem(error.code, error.counts)
    if isinstance(error, ValidationError) and any(map(_is_of_missing_unit, error.errors())):
        return Problem("unit-unavailable")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return Problem("disk-failed")
    return Problem(next((code for kind, code in _CODES if isinstance(error, kind)), "code-failed"))


def _is_of_missing_unit(detail: ErrorDetails) -> bool:
    """Whether a recipe names a unit, or a kind of partition, that nobody publishes here."""
    return detail["type"] == UNIT_UNAVAILABLE or (
        detail["type"] == "union_tag_invalid" and detail["loc"][-1:] == ("partition",)
    )
