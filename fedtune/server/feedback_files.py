"""What the server keeps of each client for error feedback: the estimate of its last merged update, in a file a round.

A round writes a file of its own and leaves that of the client's last merged round, so that a round that is begun again
finds what it found the first time. Disk holds two updates of each client that has taken part.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fedtune import checkpoint, paths
from fedtune.wire.stored_state import StoredState

__all__ = ["find_feedback_round", "read_estimates", "write_estimates"]


def find_feedback_round(run_id: str, client: int, merged: int) -> int:
    """Return the round whose estimate both ends go on from: the last merged one, or 0 if its file is missing."""
    return merged if merged and _get_path(run_id, client, merged).exists() else 0


def read_estimates(run_id: str, client: int, round_number: int) -> Mapping[str, Tensor]:
    """Return the estimates of a round by tensor, which are read on access; empty for round 0."""
    return StoredState(_get_path(run_id, client, round_number)) if round_number else {}


def write_estimates(run_id: str, client: int, rounds: tuple[int, int], tensors: Mapping[str, Tensor]) -> None:
    """Write the estimates of the second of the ``rounds``, and delete all others but those of the first."""
    kept = [_get_path(run_id, client, number) for number in rounds]
    checkpoint.write_checkpoint(kept[1], tensors)
    for path in kept[1].parent.glob("round-*.safetensors"):
        if path not in kept:
            path.unlink(missing_ok=True)


def _get_path(run_id: str, client: int, round_number: int) -> Path:
    folder = paths.get_runs_folder() / run_id / "feedback" / f"client-{client:06d}"
    return folder / f"round-{round_number:04d}.safetensors"
