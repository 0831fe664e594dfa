"""Where a round's updates rest on disk until they are merged."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedtune import paths

__all__ = ["open_spool", "sweep"]


def sweep(run_id: str) -> None:
    """Remove what a killed process left of its round: updates, and files that were not written to the end."""
    for spool in (paths.get_runs_folder() / run_id).glob("*.spool"):
        shutil.rmtree(spool)
    for beside in (paths.get_runs_folder() / run_id).rglob(".*.part"):
        beside.unlink()


@contextmanager
def open_spool(run_id: str, round_number: int) -> Iterator[Path]:
    """A folder for the updates of a round, gone when the block ends, however it does."""
    folder = paths.get_runs_folder() / run_id / f"round-{round_number:04d}.spool"
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
