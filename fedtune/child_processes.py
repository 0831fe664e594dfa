"""Child processes that import only installed modules, never modules from the working directory."""

import os
import site
import sys
from pathlib import Path

__all__ = ["environment", "make_isolated_command"]


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
