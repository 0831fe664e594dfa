"""The memory of a training process before it loads a model, measured once per machine and kept in ``FEDTUNE_HOME``."""

import subprocess
from collections.abc import Iterable, Sequence
from importlib.metadata import version

from fedtune.child_processes import environment, make_isolated_command
from fedtune.errors import FedtuneError
from fedtune.plan.cache import read_entry, write_entry
from fedtune.plan.prediction import Runtime

__all__ = ["begin_measuring_runtimes", "measure_runtimes"]


def measure_runtimes(names: Iterable[str], modules: Sequence[str]) -> dict[str, Runtime]:
    """Return the runtime of each name, from the cache or measured now. ``modules`` are what a trainer imports."""
    running = begin_measuring_runtimes(names, modules)
    return {name: _finish(name, modules, process) for name, process in running.items()}


def begin_measuring_runtimes(
    names: Iterable[str], modules: Sequence[str]
) -> dict[str, "subprocess.Popen[str] | Runtime"]:
    """Start a process for each name that is not in the cache."""
    return {name: _read(name, modules) or _start(name, modules) for name in names}


def _key(name: str, modules: Sequence[str]) -> list[str]:
    return ["runtime", name, *modules, *(f"{one} {version(one)}" for one in ("fedtune", "torch", "transformers"))]


def _read(name: str, modules: Sequence[str]) -> Runtime | None:
    found = read_entry(_key(name, modules))
    return None if found is None else Runtime(*found)


def _start(name: str, modules: Sequence[str]) -> "subprocess.Popen[str]":
    command = make_isolated_command("fedtune.plan.runtime_probe", name, *modules)
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )


def _finish(name: str, modules: Sequence[str], process: "subprocess.Popen[str] | Runtime") -> Runtime:
    if isinstance(process, Runtime):
        return process
    out, errors = process.communicate()
    if process.returncode:
        reason = errors.strip().splitlines()[-1:] or ["it was killed"]
        raise FedtuneError(f"the memory of a {name} process cannot be measured ({reason[0]}); free some memory")
    anonymous, files = (int(word) for word in out.split()[-3:-1])
    write_entry(_key(name, modules), [anonymous, files])
    return Runtime(anonymous, files)
