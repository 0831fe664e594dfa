"""Rollback of a run to an earlier round, from which it can be resumed."""

import json
from contextlib import suppress

from fedtune import checkpoint, paths
from fedtune.errors import StoreError
from fedtune.tracking.pruning import find_checkpointed_round
from fedtune.tracking.records import RoundRecord
from fedtune.tracking.run_lock import claim_run
from fedtune.tracking.store import Store

__all__ = ["rollback_run"]

_SERVED = "devices"
"""The engine of runs on real devices. A server restarts their process when it has ended."""


def rollback_run(store: Store, reference: str, number: int) -> int:
    """Delete the rounds of a run after round ``number``, and return how many they were.

    Rows are deleted first, then checkpoints. The run is interrupted afterwards. StoreError, and no change, when the run
    is being executed, has no sound checkpoint of that round, or has privacy: the privacy that its rounds spent must
    stay counted.
    """
    run = store.run(reference)
    if json.loads(run.recipe).get("privacy") is not None:
        raise StoreError(
            f"run {run.id} has privacy, and the epsilon that its rounds spent stays spent; start a new run instead"
        )
    recorded = next((found.status for found in store.list_unfinished_runs(run.engine) if found.id == run.id), "")
    if recorded == "queued" or (recorded and run.engine == _SERVED):
        raise StoreError(f"run {run.id} is {recorded}; stop it first: fedtune runs stop {run.id}")
    with claim_run(run.id):
        rounds = store.rounds(run.id)
        target = find_checkpointed_round(run.id, rounds, number).checkpoint
        assert target is not None
        checkpoint.read_checkpoint(paths.get_runs_folder() / target.path, target.sha256)
        later = [record for record in rounds if record.number > number]
        if later:
            store.forget_rounds(run.id, number, f"rolled back to round {number}; {len(later)} rounds removed")
            _remove_checkpoints(later)
    return len(later)


def _remove_checkpoints(records: list[RoundRecord]) -> None:
    """Delete the files. One that remains does no harm: the repeated round overwrites it."""
    for record in records:
        if record.checkpoint is not None:
            file = paths.get_runs_folder() / record.checkpoint.path
            for each in (file, checkpoint.get_memory_path(file)):
                with suppress(OSError):
                    each.unlink()
