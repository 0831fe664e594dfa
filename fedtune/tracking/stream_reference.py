"""A stream compared with a reference run that learned all its tasks together."""

from collections.abc import Sequence
from typing import NamedTuple

from fedtune.errors import StoreError
from fedtune.tracking.records import RoundRecord, RunRecord
from fedtune.tracking.stream_figures import compute_intransigence
from fedtune.tracking.stream_ledger import get_final_scores, make_matrix

__all__ = ["Reference", "compare_with_reference"]

Recorded = tuple[RunRecord, Sequence[RoundRecord]]


class Reference(NamedTuple):
    """The intransigence of a run towards the reference run with this id."""

    run_id: str
    intransigence: float


def compare_with_reference(recorded: Recorded, reference: Recorded) -> Reference:
    """Compute the intransigence of a run from the final scores of another.

    StoreError when the run has no stream, or when the other scored none of the tasks that the run learned.
    """
    (run, rounds), (other, _) = recorded, reference
    matrix = make_matrix(run, rounds)
    if matrix is None:
        raise StoreError(f"run {run.id} has no stream of tasks; --reference is for runs that have one")
    found = compute_intransigence(matrix, get_final_scores(*reference))
    if found is None:
        raise StoreError(
            f"run {other.id} has no final accuracy of a task that run {run.id} has learned; "
            "choose a completed run on all tasks together, with the same names"
        )
    return Reference(other.id, found)
