"""A round is committed once: its checkpoint on disk, then all of it in one transaction."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from fedtune import checkpoint, paths
from fedtune.server.events import RoundEnded, emit_event
from fedtune.server.scoring import State
from fedtune.server.task_ledger import RoundLedger
from fedtune.tracking import CheckpointRecord, ClientRecord, ClientScore, MetricRecord, RoundRecord, SampleRecord, Store
from fedtune.wire.stored_state import StoredState

__all__ = ["RoundResult", "commit_round", "get_checkpoint_path"]


class RoundResult(NamedTuple):
    """A round that is about to be committed. ``started`` is the time of its start; ``failure`` says why it failed."""

    state: State
    started: float
    records: tuple[ClientRecord, ...] = ()
    metrics: tuple[MetricRecord, ...] = ()
    failure: str | None = None
    client_scores: tuple[ClientScore, ...] = ()
    main_metric: str | None = None
    device_type: str | None = None
    samples: tuple[SampleRecord, ...] = ()
    memory: Mapping[str, Tensor] | None = None
    """The server's whole memory: of earlier tasks in a round that ends one, and the run state of every round."""
    ledger: RoundLedger = RoundLedger()


def commit_round(store: Store, run_id: str, round_number: int, result: RoundResult) -> StoredState:
    """Write the checkpoint, then commit the round to the store; return the state as it is on disk."""
    path = get_checkpoint_path(run_id, round_number)
    file = paths.get_runs_folder() / path
    sha256 = checkpoint.write_checkpoint(file, result.state)
    memory_sha256, memory_bytes = _write_memory(checkpoint.get_memory_path(file), result.memory)
    record = RoundRecord(
        number=round_number,
        status="failed" if result.failure else "completed",
        reason=result.failure or "",
        seconds=time.perf_counter() - result.started,
        client_records=result.records,
        metrics=result.metrics,
        checkpoint=CheckpointRecord(
            path=path,
            sha256=sha256,
            bytes=file.stat().st_size,
            memory_sha256=memory_sha256,
            memory_bytes=memory_bytes,
        ),
        client_scores=result.client_scores,
        device_type=result.device_type,
        samples=result.samples,
        **result.ledger._asdict(),
    )
    store.commit_round(run_id, record)
    emit_event(RoundEnded(record, result.main_metric))
    return StoredState(file)


def _write_memory(file: Path, memory: Mapping[str, Tensor] | None) -> tuple[str | None, int | None]:
    """Write the memory beside the checkpoint; return its digest and its size in bytes."""
    if memory is None:
        return None, None
    return checkpoint.write_checkpoint(file, memory), file.stat().st_size


def get_checkpoint_path(run_id: str, round_number: int) -> str:
    """Return the path of a round's checkpoint in the folder of runs."""
    return f"{run_id}/round-{round_number:04d}.safetensors"
