"""Checkpoints that need not stay: marked as pruned in the store first, then removed from disk."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress

from fedtune import paths
from fedtune.errors import StoreError
from fedtune.recipe.checkpoint_settings import Keep
from fedtune.tracking.records import RoundRecord
from fedtune.tracking.store import Store

__all__ = ["kept_rounds", "prune", "remove_pruned", "to_prune", "with_checkpoint"]

_METRICS = (("accuracy", 1.0), ("perplexity", -1.0), ("loss", -1.0))
"""What tells the best round, the first that is there, and its sign."""
_SPLITS = ("validation", "local")

Scores = Mapping[tuple[str, str], float]
"""Figures of one round over all domains, by split and name."""


def prune(store: Store, run_id: str, keep: Keep) -> list[int]:
    """Remove the checkpoints that ``keep`` does not name, after a round was committed; returns their rounds.

    A process that is killed meanwhile leaves at most files that no row names, for ``remove_pruned``.
    """
    unpruned = store.checkpoints.scores(run_id)
    gone = to_prune(unpruned, keep)
    for path in store.checkpoints.mark_pruned(run_id, gone):
        with suppress(OSError):
            (paths.get_runs_folder() / path).unlink(missing_ok=True)
    return gone


def to_prune(scores: Mapping[int, Scores], keep: Keep) -> list[int]:
    """Of rounds that have a checkpoint, those whose is not kept; the best one so far is among them if it is kept."""
    rounds = sorted(scores)
    stay = {0, *rounds[-keep.last :]}
    if keep.every is not None:
        stay |= {number for number in rounds if number % keep.every == 0}
    if keep.best and (best := _best(scores)) is not None:
        stay.add(best)
    return [number for number in rounds if number not in stay]


def _best(scores: Mapping[int, Scores]) -> int | None:
    """The first of the rounds that scored best; round 0 stays anyway and does not count."""
    for split in _SPLITS:
        for name, sign in _METRICS:
            found = {number: sign * of[split, name] for number, of in scores.items() if number and (split, name) in of}
            sound = {number: value for number, value in found.items() if not math.isnan(value)}
            if sound:
                return max(sorted(sound), key=lambda number: sound[number])
    return None


def remove_pruned(rounds: Sequence[RoundRecord]) -> None:
    """Remove what a process that was killed while it pruned has left."""
    for record in rounds:
        if record.checkpoint is not None and record.checkpoint.pruned:
            with suppress(OSError):
                (paths.get_runs_folder() / record.checkpoint.path).unlink(missing_ok=True)


def kept_rounds(rounds: Sequence[RoundRecord]) -> list[int]:
    """The rounds whose checkpoints are there."""
    return [record.number for record in rounds if record.checkpoint is not None and not record.checkpoint.pruned]


def with_checkpoint(run_id: str, rounds: Sequence[RoundRecord], number: int | None = None) -> RoundRecord:
    """The round of this number, or the newest, with a checkpoint; StoreError says which are there when it has none."""
    kept = kept_rounds(rounds)
    wanted = kept[-1] if number is None and kept else number
    record = next((record for record in rounds if record.number == wanted), None)
    if record is not None and record.number in kept:
        return record
    there = f"its checkpoints are those of {_listed(kept)}" if kept else "it has no checkpoint at all"
    if record is not None and record.checkpoint is not None:
        raise StoreError(f"round {number} of run {run_id} was pruned, as checkpoints.keep says; {there}")
    lacks = "a checkpoint" if number is None else f"a checkpoint of round {number}"
    raise StoreError(f"run {run_id} has not recorded {lacks}; {there}; see: fedtune runs show {run_id}")


def _listed(numbers: Sequence[int]) -> str:
    shown = [str(number) for number in numbers]
    return "round " + shown[0] if len(shown) == 1 else f"rounds {', '.join(shown[:-1])} and {shown[-1]}"
