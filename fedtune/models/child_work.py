"""Starts a child process for work that needs transformers, so that a light process need not import it."""

import subprocess
from pathlib import Path

from fedtune.child_processes import environment, make_isolated_command
from fedtune.errors import ModelError

__all__ = ["LIMIT_SECONDS", "run_in_child"]

LIMIT_SECONDS = 1800.0
"""Reading every number of a GGUF file of some gigabytes takes minutes on a small board."""


def run_in_child(work: str, source: str, folder: Path) -> bool:
    """Fill a folder in a child process; return whether it could. Otherwise the folder is left empty.

    ``work`` is one of those in ``fedtune.models.transformers_child``. ModelError if it takes longer than LIMIT_SECONDS.
    """
    command = make_isolated_command("fedtune.models.transformers_child", work, source, str(folder))
    try:
        done = subprocess.run(
            command,
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=LIMIT_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        _empty(folder)
        raise ModelError(
            f"{source} was not read within {LIMIT_SECONDS:.0f} seconds, and its process was ended; let other "
            "programs leave it more processor time and disk, or use a smaller model"
        ) from error
    if done.returncode:
        _empty(folder)
    return done.returncode == 0


def _empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
