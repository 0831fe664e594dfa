"""Starts a child process for work that needs transformers, so that a light process need not import it."""

import subprocess
from pathlib import Path

from fedtune.child_processes import environment, make_isolated_command

__all__ = ["run_in_child"]


def run_in_child(work: str, source: str, folder: Path) -> bool:
    """Fill a folder in a child process; return whether it could. Otherwise the folder is left empty.

    ``work`` is one of those in ``fedtune.models.transformers_child``.
    """
    command = make_isolated_command("fedtune.models.transformers_child", work, source, str(folder))
    done = subprocess.run(command, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        for file in folder.iterdir():
            file.unlink()
    return done.returncode == 0
