"""Child processes that import what is installed, never what lies in the folder they are started in."""

import os
import site
import sys
from pathlib import Path

__all__ = ["environment", "make_isolated_command"]


def make_isolated_command(module: str, *arguments: str) -> list[str]:
    """The command that runs one of our modules; ``-P`` keeps the working folder out of the search for modules."""
    return [sys.executable, "-P", "-m", module, *arguments]


def environment() -> dict[str, str]:
    """This process's environment for a child, in which what the child starts is kept from the working folder too.

    An empty entry of ``PYTHONPATH`` means the working folder, so empty entries are dropped. The folder this fedtune was
    imported from is put first, unless every Python process looks there anyway.
    """
    given = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    root = str(Path(__file__).resolve().parents[1])
    known = {str(Path(folder).resolve()) for folder in [*site.getsitepackages(), site.getusersitepackages()]}
    wanted = given if root in known else [root, *given]
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    found = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(wanted))} if wanted else {}
    return kept | found | {"PYTHONSAFEPATH": "1"}
