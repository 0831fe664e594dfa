"""Pruning of checkpoints: they are marked in the store first, then deleted from disk."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from fedtune import checkpoint, paths
from fedtune.errors import StoreError
from fedtune.recipe.checkpoint_settings import Keep
from fedtune.recipe.metric_names import LOWER_IS_BETTER, choose_main_metric
from fedtune.tracking.records import RoundRecord
from fedtune.tracking.store import Store

__all__ = [
    "find_checkpointed_round",
    "list_kept_rounds",
    "prune_run_checkpoints",
    "remove_pruned_checkpoints",
    "select_prunable_rounds",
]

_SPLITS = ("validation", "local")
_BORDERS = 2

Scores = Mapping[tuple[str, str], float]
"""The metrics of one round over all domains, by split and name."""


def prune_run_checkpoints(
    store: Store, run_id: str, keep: Keep, recipe: Mapping[str, Any], borders: Sequence[int] = ()
) -> list[int]:
    """Delete the checkpoints that ``keep`` does not select, after a commit, and return their rounds.

    ``borders`` are the rounds that end tasks of a stream; the newest two stay, with the server's memory beside them.
    ``recipe`` is the run's as JSON has it, which says which metric counts. A process that is killed meanwhile leaves
    marked files at most, which are left to ``remove_pruned_checkpoints``.
    """
    unpruned = store.checkpoints.read_scores(run_id)
    stay = [number for number in borders if number in unpruned][-_BORDERS:]
    gone = [number for number in select_prunable_rounds(unpruned, keep, recipe) if number not in stay]
    for path in store.checkpoints.mark_pruned(run_id, gone):
        _delete_files(path)
    return gone


def select_prunable_rounds(scores: Mapping[int, Scores], keep: Keep, recipe: Mapping[str, Any]) -> list[int]:
    """Return the rounds whose checkpoint is not to be kept. The best round so far stays if ``keep`` says so."""
    rounds = sorted(scores)
    stay = {0, *rounds[-keep.last :]}
    if keep.every is not None:
        stay |= {number for number in rounds if number % keep.every == 0}
    if keep.best and (best := _best(scores, recipe)) is not None:
        stay.add(best)
    return [number for number in rounds if number not in stay]


def _best(scores: Mapping[int, Scores], recipe: Mapping[str, Any]) -> int | None:
    """Return the first round with the best score. Round 0 does not count, it stays in any case."""
    for split in _SPLITS:
        sound = {
            number: {name: value for (found, name), value in of.items() if found == split and not math.isnan(value)}
            for number, of in scores.items()
            if number
        }
        name = choose_main_metric(recipe, {name for of in sound.values() for name in of})
        if name is not None:
            sign = -1 if name in LOWER_IS_BETTER else 1
            values = {number: sign * of[name] for number, of in sorted(sound.items()) if name in of}
            return max(values, key=lambda number: values[number])
    return None


def remove_pruned_checkpoints(rounds: Sequence[RoundRecord]) -> None:
    """Delete the files that a process left when it was killed during pruning."""
    for record in rounds:
        if record.checkpoint is not None and record.checkpoint.pruned:
            _delete_files(record.checkpoint.path)


def _delete_files(path: str) -> None:
    """Delete a checkpoint and the server's memory beside it."""
    file = paths.get_runs_folder() / path
    for each in (file, checkpoint.get_memory_path(file)):
        with suppress(OSError):
            each.unlink(missing_ok=True)


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
