"""Kills a process with -9 where it puts a file in its place, once: before, after, or with half of the file written.

A program that finds ``FEDTUNE_BENCHMARK_PLANT`` in its environment, and the folder of ``write_site_hook`` in its
``PYTHONPATH``, is planted as soon as Python starts, and so are its children. Everything that fedtune must not lose is
renamed into its place.
"""

import json
import os
import re
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["VARIABLE", "Plant", "install", "install_from_environment", "write_site_hook"]

VARIABLE = "FEDTUNE_BENCHMARK_PLANT"
_HOOK = "from benchmarks.stream_plants import install_from_environment\n\ninstall_from_environment()\n"


@dataclass(frozen=True)
class Plant:
    """A kill at the first file that is put at a path that ``pattern`` is found in.

    ``mark`` is the file that tells that it has happened, so that it does not happen to the next process.
    """

    pattern: str
    moment: str
    mark: str = ""

    def as_text(self) -> str:
        """Its form in the environment."""
        return json.dumps(asdict(self))


def install(plant: Plant) -> None:
    """Let this process die at the plant."""
    real = Path.replace

    def replace(path: Path, target: str | os.PathLike[str]) -> Path:
        if not re.search(plant.pattern, str(target)) or (plant.mark and Path(plant.mark).exists()):
            return real(path, target)
        if plant.mark:
            Path(plant.mark).touch()
        if plant.moment == "half":
            os.truncate(path, path.stat().st_size // 2)
        if plant.moment == "after":
            real(path, target)
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
        raise AssertionError("it was killed")

    Path.replace = replace  # type: ignore[assignment, method-assign]


def install_from_environment() -> None:
    """Let this process die at the plant of its environment, if it has one."""
    if text := os.environ.get(VARIABLE):
        install(Plant(**json.loads(text)))


def write_site_hook(folder: Path) -> Path:
    """Write the module that Python imports when it starts, and return the folder for ``PYTHONPATH``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_HOOK, encoding="utf-8")
    return folder
