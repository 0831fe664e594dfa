"""A round that fails leaves the state as it was: too few updates, or a merge that cannot be used."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedtune.errors import ClientUpdateError, RecipeError
from fedtune.recipe.schema import Recipe
from fedtune.tracking import ClientRecord

__all__ = ["MERGE_ERRORS", "explain_shortage", "mark_updates_unused", "require_finite", "with_refusals"]

MERGE_ERRORS = (ArithmeticError, ClientUpdateError, RecipeError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
"""Updates that do not hold, too few for the merge, or values it cannot compute with. Other errors end the run."""


def require_finite(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The state; ClientUpdateError when a value of it is not finite."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ClientUpdateError(f"it gave values in {name} that are not finite; the state stays as it was")
    return state


def explain_shortage(records: Sequence[ClientRecord], recipe: Recipe) -> str | None:
    """Why a round has too few updates; None if it has enough."""
    usable = sum(record.status == "merged" for record in records)
    if usable >= recipe.federation.quorum:
        return None
    return with_refusals(f"{usable} usable contributions, quorum {recipe.federation.quorum}", records)


def mark_updates_unused(records: Sequence[ClientRecord]) -> list[ClientRecord]:
    """The records of a failed round: what could have been merged was not."""
    return [
        replace(record, status="unused", reason="the round failed") if record.status == "merged" else record
        for record in records
    ]


def with_refusals(failure: str, records: Sequence[ClientRecord]) -> str:
    """Why a round failed, with the first reasons why updates are missing from it."""
    reasons = sorted({f"{record.status}: {record.reason}" for record in records if record.status != "merged"})
    return "; ".join([failure, *reasons[:3]])
