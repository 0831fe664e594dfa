"""The memory of a training process before it loads a model, measured once per machine and kept in ``FEDTUNE_HOME``."""

import subprocess
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.metadata import version

from fedtune.child_processes import environment, make_isolated_command
from fedtune.errors import FedtuneError
from fedtune.plan.cache import read_entry, write_entry
from fedtune.plan.prediction import Runtime

__all__ = ["TRAINER_MODULES", "begin_measuring_runtimes", "make_runtime_key", "measure_runtimes", "read_runtime"]

TRAINER_MODULES = ("fedtune.device.trainer",)
"""What a device's training process imports."""


def measure_runtimes(names: Iterable[str], modules: Sequence[str]) -> dict[str, Runtime]:
    """Return the runtime of each name, from the cache or measured now. ``modules`` are what a trainer imports."""
    running = begin_measuring_runtimes(names, modules)
    return {name: _finish(name, modules, process) for name, process in running.items()}


def begin_measuring_runtimes(
    names: Iterable[str], modules: Sequence[str]
) -> dict[str, "subprocess.Popen[str] | Runtime"]:
    """Start a process for each name that is not in the cache."""
    return {name: read_runtime(name, modules) or _start(name, modules) for name in names}


def make_runtime_key(name: str, modules: Sequence[str]) -> list[str]:
    """Return what the memory of a runtime depends on."""
    return ["runtime", name, *modules, *(f"{one} {version(one)}" for one in ("fedtune", "torch", "transformers"))]


def read_runtime(name: str, modules: Sequence[str]) -> Runtime | None:
    """Return the runtime that was measured before, None if none was, or if another version wrote it in another form."""
    found = read_entry(make_runtime_key(name, modules))
    with suppress(TypeError, ValueError):
        anonymous, files = found
        return Runtime(int(anonymous), int(files))
    return None


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
    write_entry(make_runtime_key(name, modules), [anonymous, files])
    return Runtime(anonymous, files)
