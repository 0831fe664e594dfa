"""What clients send for a drift signal besides a score, by round. It is a pure function of the plan.

In the round that begins a task, clients send their part of the reference. It is added to that of the tasks before. A
task that comes again, or that an alarm opened, is added again: its examples may be others than those of the first time.
In the next round they score batches of examples that they left out of it, from which the threshold is read. In all
other rounds they send one number and one count.
"""

from typing import Literal

from fedtune.continual._plan import StreamPlan

__all__ = ["DRIFT_PREFIX", "SCORED_BATCHES", "Phase", "find_phase"]

DRIFT_PREFIX = "drift/"
"""The names of the tensors of a drift signal, in updates and in the server's memory, begin with this."""
SCORED_BATCHES = 32
"""The number of batches that each client scores for the threshold."""

Phase = Literal["reference", "threshold"]


def find_phase(plan: StreamPlan, round_number: int) -> Phase | None:
    """Return what clients send in a round besides their score; None for nothing."""
    if _begins_task(plan, round_number):
        return "reference"
    return "threshold" if _begins_task(plan, round_number - 1) else None


def _begins_task(plan: StreamPlan, round_number: int) -> bool:
    return round_number == 1 or (round_number > 1 and plan.find_border(round_number - 1) is not None)
