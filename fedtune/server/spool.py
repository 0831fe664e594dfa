"""The folder for a round's updates on disk until they are merged."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedtune import paths

__all__ = ["open_spool", "sweep"]


def sweep(run_id: str) -> None:
    """Delete the updates and incomplete files of a killed process."""
    for spool in (paths.get_runs_folder() / run_id).glob("*.spool"):
        shutil.rmtree(spool)
    for beside in (paths.get_runs_folder() / run_id).rglob(".*.part"):
        beside.unlink()


@contextmanager
def open_spool(run_id: str, round_number: int) -> Iterator[Path]:
    """Yield a folder for the updates of a round. It is deleted when the block ends, also after an error."""
    folder = paths.get_runs_folder() / run_id / f"round-{round_number:04d}.spool"
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
