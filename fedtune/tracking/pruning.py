"""Pruning of checkpoints: they are marked in the store first, then deleted from disk."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress

from fedtune import paths
from fedtune.errors import StoreError
from fedtune.recipe.checkpoint_settings import Keep
from fedtune.tracking.records import RoundRecord
from fedtune.tracking.store import Store

__all__ = [
    "find_checkpointed_round",
    "list_kept_rounds",
    "prune_run_checkpoints",
    "remove_pruned_checkpoints",
    "select_prunable_rounds",
]

_METRICS = (("accuracy", 1.0), ("perplexity", -1.0), ("loss", -1.0))
"""The metrics that select the best round, with their signs. The first that was recorded counts."""
_SPLITS = ("validation", "local")

Scores = Mapping[tuple[str, str], float]
"""The metrics of one round over all domains, by split and name."""


def prune_run_checkpoints(store: Store, run_id: str, keep: Keep) -> list[int]:
    """Delete the checkpoints that ``keep`` does not select, after a commit, and return their rounds.

    A process that is killed meanwhile leaves marked files at most, which are left to ``remove_pruned_checkpoints``.
    """
    unpruned = store.checkpoints.read_scores(run_id)
    gone = select_prunable_rounds(unpruned, keep)
    for path in store.checkpoints.mark_pruned(run_id, gone):
        with suppress(OSError):
            (paths.get_runs_folder() / path).unlink(missing_ok=True)
    return gone


def select_prunable_rounds(scores: Mapping[int, Scores], keep: Keep) -> list[int]:
    """Return the rounds whose checkpoint is not to be kept. The best round so far stays if ``keep`` says so."""
    rounds = sorted(scores)
    stay = {0, *rounds[-keep.last :]}
    if keep.every is not None:
        stay |= {number for number in rounds if number % keep.every == 0}
    if keep.best and (best := _best(scores)) is not None:
        stay.add(best)
    return [number for number in rounds if number not in stay]


def _best(scores: Mapping[int, Scores]) -> int | None:
    """Return the first round with the best score. Round 0 does not count, it stays in any case."""
    for split in _SPLITS:
        for name, sign in _METRICS:
            found = {number: sign * of[split, name] for number, of in scores.items() if number and (split, name) in of}
            sound = {number: value for number, value in found.items() if not math.isnan(value)}
            if sound:
                return max(sorted(sound), key=lambda number: sound[number])
    return None


def remove_pruned_checkpoints(rounds: Sequence[RoundRecord]) -> None:
    """Delete the files that a process left when it was killed during pruning."""
    for record in rounds:
        if record.checkpoint is not None and record.checkpoint.pruned:
            with suppress(OSError):
                (paths.get_runs_folder() / record.checkpoint.path).unlink(missing_ok=True)


def list_kept_rounds(rounds: Sequence[RoundRecord]) -> list[int]:
    """Return the rounds whose checkpoints are on disk."""
    return [record.number for record in rounds if record.checkpoint is not None and not record.checkpoint.pruned]


def find_checkpointed_round(run_id: str, rounds: Sequence[RoundRecord], number: int | None = None) -> RoundRecord:
    """Return the round of this number, or the newest one, that has a checkpoint; StoreError when there is none."""
    kept = list_kept_rounds(rounds)
    wanted = kept[-1] if number is None and kept else number
    record = next((record for record in rounds if record.number == wanted), None)
    if record is not None and record.number in kept:
        return record
    there = f"it has the checkpoints of {_describe_rounds(kept)}" if kept else "it has no checkpoint at all"
    if record is not None and record.checkpoint is not None:
        raise StoreError(f"round {number} of run {run_id} was pruned, as checkpoints.keep says; {there}")
    lacks = "a checkpoint" if number is None else f"a checkpoint of round {number}"
    raise StoreError(f"run {run_id} has not recorded {lacks}; {there}; see: fedtune runs show {run_id}")


def _describe_rounds(numbers: Sequence[int]) -> str:
    shown = [str(number) for number in numbers]
    return "round " + shown[0] if len(shown) == 1 else f"rounds {', '.join(shown[:-1])} and {shown[-1]}"
