"""Taking a run back to an earlier round, from where it can be resumed."""

import json
from contextlib import suppress

from fedtune import checkpoint, home
from fedtune.errors import StoreError
from fedtune.tracking.lock import claim
from fedtune.tracking.records import RoundRecord
from fedtune.tracking.store import Store

__all__ = ["rollback"]


def rollback(store: Store, reference: str, number: int) -> int:
    """Remove the rounds of a run after round ``number``, rows first and then their checkpoints; how many they were.

    The run counts as interrupted afterwards. StoreError, and nothing changed, when the run is being executed, has no
    such round or no sound checkpoint of it, or has privacy: what its rounds told cannot be untold, so it must stay
    counted.
    """
    run = store.run(reference)
    if json.loads(run.recipe).get("privacy") is not None:
        raise StoreError(
            f"run {run.id} has privacy: what its rounds told of clients stays told and counted; start a new run instead"
        )
    with claim(run.id):
        rounds = store.rounds(run.id)
        target = next((record for record in rounds if record.number == number), None)
        if target is None:
            last = rounds[-1].number if rounds else None
            there = "none yet" if last is None else f"0 to {last}"
            raise StoreError(f"run {run.id} has no round {number}; its rounds are {there}")
        _check_sound(run.id, target)
        later = [record for record in rounds if record.number > number]
        if later:
            store.forget_rounds(run.id, number, f"rolled back to round {number}; {len(later)} rounds removed")
            _remove_checkpoints(later)
    return len(later)


def _check_sound(run_id: str, record: RoundRecord) -> None:
    if record.checkpoint is None:
        raise StoreError(f"round {record.number} of run {run_id} has no checkpoint; choose another round")
    checkpoint.load(home.runs() / record.checkpoint.path, record.checkpoint.sha256)


def _remove_checkpoints(records: list[RoundRecord]) -> None:
    """A file that stays behind is only litter: the round that is done again writes over it."""
    for record in records:
        if record.checkpoint is not None:
            with suppress(OSError):
                (home.runs() / record.checkpoint.path).unlink()
