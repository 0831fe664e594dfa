"""Reasons for failed rounds, which leave the state unchanged: too few updates, or a merge that failed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedtune.errors import ClientUpdateError, RecipeError
from fedtune.recipe.schema import Recipe
from fedtune.tracking import ClientRecord

__all__ = ["MERGE_ERRORS", "explain_shortage", "mark_updates_unused", "require_finite", "with_refusals"]

MERGE_ERRORS = (ArithmeticError, ClientUpdateError, RecipeError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
"""Invalid updates, too few updates for the merge, or numerical errors. Other errors end the run."""


def require_finite(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the state; raise ClientUpdateError if a value is not finite."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ClientUpdateError(f"it gave values in {name} that are not finite; the state stays as it was")
    return state


def explain_shortage(records: Sequence[ClientRecord], recipe: Recipe) -> str | None:
    """Return why a round has too few updates; None if it has enough."""
    usable = sum(record.status == "merged" for record in records)
    if usable >= recipe.federation.quorum:
        return None
    return with_refusals(f"{usable} usable client updates, quorum {recipe.federation.quorum}", records)


def mark_updates_unused(records: Sequence[ClientRecord]) -> list[ClientRecord]:
    """Return the records of a failed round, with usable updates marked as unused."""
    return [
        replace(record, status="unused", reason="the round failed") if record.status == "merged" else record
        for record in records
    ]


def with_refusals(failure: str, records: Sequence[ClientRecord]) -> str:
    """Return why a round failed, with the first reasons why updates are missing."""
    reasons = sorted({f"{record.status}: {record.reason}" for record in records if record.status != "merged"})
    return "; ".join([failure, *reasons[:3]])
