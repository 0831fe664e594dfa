"""Commands in processes that can be killed at an exact point: forked from one that has imported everything already."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import safetensors.torch
from sqlalchemy import Engine, event

from fedtune import files
from fedtune.cli.main import main
from fedtune.server import replies
from fedtune.tracking import RoundRecord, Store

__all__ = ["MEMORY_PLANTS", "PLANTS", "command", "start"]

Call = Callable[..., Any]
_ROUND = "round-0002"


def start(home: Path, *argv: str, plant: str = "") -> ForkServerProcess:
    """``fedtune argv`` in a process of its own, to be killed at the planted point, if any."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", __name__, "fedtune.cli.simulate", "fedtune.simulation"])
    process = context.Process(target=command, args=(str(home), argv, plant))
    process.start()
    return process


def command(home: str, argv: Sequence[str], plant: str) -> None:
    """Run the real command line; what it prints goes to a file in its home."""
    os.environ["FEDTUNE_HOME"] = home
    Path(home).mkdir(parents=True, exist_ok=True)
    printed = os.open(f"{home}/printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    sys.argv = ["fedtune", *argv]
    if plant:
        {**PLANTS, **MEMORY_PLANTS}[plant]()
    main()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _wrap(owner: Any, name: str, when: Callable[..., bool], *, after: bool) -> None:
    """Die at the first call of ``owner.name`` that meets the condition, before or after it."""
    real: Call = getattr(owner, name)

    def wrapped(*args: Any, **settings: Any) -> Any:
        if not after and when(*args):
            _die()
        result = real(*args, **settings)
        if after and when(*args):
            _die()
        return result

    setattr(owner, name, wrapped)


def _before_the_rename() -> None:
    _wrap(Path, "replace", lambda path, target: target.stem == _ROUND, after=False)


def _after_the_rename() -> None:
    _wrap(Path, "replace", lambda path, target: target.stem == _ROUND, after=True)


def _in_the_flush() -> None:
    _wrap(files, "_flush", lambda path: f".{_ROUND}" in path.name, after=False)


def _half_a_checkpoint() -> None:
    real = safetensors.torch.save_file

    def save_file(tensors: Any, filename: Any, metadata: Any = None) -> None:
        real(tensors, filename, metadata)
        if f".{_ROUND}" in Path(filename).name:
            os.truncate(filename, os.path.getsize(filename) // 2)
            _die()

    safetensors.torch.save_file = save_file


def _half_a_spooled_contribution() -> None:
    real = Path.write_bytes

    def write_bytes(path: Path, content: bytes) -> int:
        chosen = f"{_ROUND}.spool" in str(path) and "client-000002" in path.name
        written = real(path, content[: len(content) // 2] if chosen else content)
        if chosen:
            _die()
        return written

    Path.write_bytes = write_bytes  # type: ignore[assignment, method-assign]


def _after_spooling() -> None:
    _wrap(
        replies,
        "write_bytes_atomically",
        lambda path, _: path.parent.stem == _ROUND and path.stem == "client-000003",
        after=True,
    )


def _in_the_transaction() -> None:
    def executed(_: Any, __: Any, statement: str, parameters: Any, *rest: Any) -> None:
        if statement.startswith("INSERT INTO rounds") and 2 in tuple(parameters):
            _die()

    event.listen(Engine, "after_cursor_execute", executed)


def _before_the_commit() -> None:
    _wrap(Store, "commit_round", _is_round(2), after=False)


def _after_the_commit() -> None:
    _wrap(Store, "commit_round", _is_round(2), after=True)


def _in_round_zero() -> None:
    _wrap(Store, "commit_round", _is_round(0), after=False)


def _before_the_end_is_recorded() -> None:
    _wrap(Store, "finish", lambda *_: True, after=False)


def _is_round(number: int) -> Callable[[Store, str, RoundRecord], bool]:
    return lambda store, run, record: record.number == number


def _before_the_memory_rename() -> None:
    _wrap(Path, "replace", _is_memory_of_client_2, after=False)


def _after_the_memory_rename() -> None:
    _wrap(Path, "replace", _is_memory_of_client_2, after=True)


def _half_a_memory_file() -> None:
    def cut(path: Path) -> bool:
        found = ".memory-0001." in path.name and "client-000002" in str(path)
        if found:
            os.truncate(path, os.path.getsize(path) // 2)
        return found

    _wrap(files, "_flush", cut, after=False)


def _is_memory_of_client_2(_: Path, target: Path) -> bool:
    return target.name == "memory-0001.safetensors" and "client-000002" in str(target)


PLANTS: dict[str, Callable[[], None]] = {
    "in round 0": _in_round_zero,
    "half a spooled contribution": _half_a_spooled_contribution,
    "after spooling": _after_spooling,
    "half a checkpoint": _half_a_checkpoint,
    "in the flush": _in_the_flush,
    "before the rename": _before_the_rename,
    "after the rename": _after_the_rename,
    "before the commit": _before_the_commit,
    "in the transaction": _in_the_transaction,
    "after the commit": _after_the_commit,
    "before the end is recorded": _before_the_end_is_recorded,
}
MEMORY_PLANTS: dict[str, Callable[[], None]] = {
    "before the memory rename": _before_the_memory_rename,
    "after the memory rename": _after_the_memory_rename,
    "half a memory file": _half_a_memory_file,
}
