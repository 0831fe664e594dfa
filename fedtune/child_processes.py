"""Child processes: started so that they import only installed modules, and waited for."""

import os
import select
import site
import sys
from pathlib import Path
from typing import Protocol

__all__ = ["environment", "make_isolated_command", "wait_until_readable"]


class _Readable(Protocol):
    def fileno(self) -> int: ...


def make_isolated_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module; ``-P`` keeps the working directory out of the module search path."""
    return [sys.executable, "-P", "-m", module, *arguments]


def environment() -> dict[str, str]:
    """Return this process's environment for a child, which keeps the working directory out of its children's search
    path.

    An empty entry of ``PYTHONPATH`` means the working directory, so empty entries are dropped. The folder of this
    fedtune comes first, unless every Python process searches it anyway.
    """
    given = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    root = str(Path(__file__).resolve().parents[1])
    known = {str(Path(folder).resolve()) for folder in [*site.getsitepackages(), site.getusersitepackages()]}
    wanted = given if root in known else [root, *given]
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    found = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(wanted))} if wanted else {}
    return kept | found | {"PYTHONSAFEPATH": "1"}


def wait_until_readable(stream: _Readable, seconds: float) -> bool:
    """Whether a pipe or socket has something to read, or its other end is closed, within some seconds.

    A server has raised its limit of open files, and ``select.select`` refuses descriptors above 1,023.
    """
    watched = select.poll()
    watched.register(stream.fileno(), select.POLLIN)
    return bool(watched.poll(1000 * seconds))
