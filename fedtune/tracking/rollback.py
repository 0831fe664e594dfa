"""Taking a run back to an earlier round, from where it can be resumed."""

import json
from contextlib import suppress

from fedtune import checkpoint, paths
from fedtune.errors import StoreError
from fedtune.tracking.pruning import with_checkpoint
from fedtune.tracking.records import RoundRecord
from fedtune.tracking.run_lock import claim_run
from fedtune.tracking.store import Store

__all__ = ["rollback"]

_SERVED = "devices"
"""The engine of runs that a server carries on, which starts them again when their process is gone."""


def rollback(store: Store, reference: str, number: int) -> int:
    """Remove the rounds of a run after round ``number``, rows first and then their checkpoints; how many they were.

    The run counts as interrupted afterwards. StoreError, and nothing changed, when the run is being executed, has no
    sound checkpoint of that round, or has privacy: what its rounds told cannot be untold, so it must stay
    counted.
    """
    run = store.run(reference)
    if json.loads(run.recipe).get("privacy") is not None:
        raise StoreError(
            f"run {run.id} has privacy: what its rounds told of clients stays told and counted; start a new run instead"
        )
    recorded = next((found.status for found in store.list_unfinished_runs(run.engine) if found.id == run.id), "")
    if recorded == "queued" or (recorded and run.engine == _SERVED):
        raise StoreError(f"run {run.id} is {recorded}; stop it first: fedtune runs stop {run.id}")
    with claim_run(run.id):
        rounds = store.rounds(run.id)
        target = with_checkpoint(run.id, rounds, number).checkpoint
        assert target is not None
        checkpoint.read_checkpoint(paths.get_runs_folder() / target.path, target.sha256)
        later = [record for record in rounds if record.number > number]
        if later:
            store.forget_rounds(run.id, number, f"rolled back to round {number}; {len(later)} rounds removed")
            _remove_checkpoints(later)
    return len(later)


def _remove_checkpoints(records: list[RoundRecord]) -> None:
    """A file that stays behind is only litter: the round that is done again writes over it."""
    for record in records:
        if record.checkpoint is not None:
            with suppress(OSError):
                (paths.get_runs_folder() / record.checkpoint.path).unlink()
