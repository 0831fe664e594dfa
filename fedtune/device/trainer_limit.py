"""What holds a trainer to its memory from outside: a control group, a scope of systemd, or the device alone.

In all cases the trainer limits its own private memory while it trains, and the device looks at it all the time. A group
holds it too: the kernel ends the trainer before the machine runs short. This module does not import torch.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from fedtune.device.cgroups import Cgroup, CgroupError, CgroupTree
from fedtune.errors import DeviceError

__all__ = ["GroupLimit", "ProcessLimit", "ScopeLimit", "TrainerLimit", "choose_trainer_limit"]

_PROBE_SECONDS = 10.0
_NEAR = 0.9
"""The share of its budget that a trainer held when it was killed, from which on the kill was for its memory."""
_JOIN = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
_TELL = 'cat "/sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup)/memory.max"'
_MEND = (
    "run the device as the unit that fedtune device package writes, or begin the command with systemd-run --user "
    "--scope -p Delegate=memory"
)


class TrainerLimit(Protocol):
    """A limit of a trainer's memory. ``name`` is told to the server, ``sentence`` to the device's log."""

    name: str
    sentence: str

    def wrap_command(self, command: Sequence[str]) -> list[str]:
        """Return the command that starts the trainer within the limit, as the same process."""

    def has_killed(self, held: int) -> bool:
        """Whether the limit ended the trainer, which held ``held`` bytes when it was last looked at."""

    def close(self) -> None:
        """Remove what was made for the limit. The trainer has ended."""


class ProcessLimit:
    """The trainer's limit on its own private memory, where the system has one, and the look of the device at it."""

    def __init__(self, reason: str = "") -> None:
        on_linux = sys.platform == "linux"
        self.name = "rlimit" if on_linux else "watchdog"
        held = "RLIMIT_DATA and a watchdog" if on_linux else "a watchdog, as this system limits no private memory"
        self.sentence = f"{held} (no control group: {reason}; to get one, {_MEND})" if reason else held

    def wrap_command(self, command: Sequence[str]) -> list[str]:
        """Return the command as it is."""
        return list(command)

    def has_killed(self, held: int) -> bool:
        """Return False: this limit raises errors, and the device knows what it ends itself."""
        return False

    def close(self) -> None:
        """Do nothing."""


class GroupLimit:
    """A control group of version 2 for the trainer."""

    name = "cgroup"

    def __init__(self, group: Cgroup) -> None:
        self._group = group
        self.sentence = f"the control group {group.path}"

    def wrap_command(self, command: Sequence[str]) -> list[str]:
        """Return a shell command that joins the group and becomes the trainer.

        Memory counts in the group from the start. If the group cannot be joined, no trainer runs.
        """
        with suppress(CgroupError):  # then the shell cannot join either, and says so
            self._group.apply_limit()
        return ["/bin/sh", "-c", _JOIN, str(self._group.path), *command]

    def has_killed(self, held: int) -> bool:
        """Whether the kernel says so."""
        return self._group.has_killed()

    def close(self) -> None:
        """Remove the group."""
        self._group.remove()


class ScopeLimit:
    """A scope that systemd makes for the trainer, for users whose own group is not delegated to them."""

    name = "scope"
    sentence = "a scope of systemd"

    def __init__(self, budget: int, *, user: bool) -> None:
        self._budget, self._user = budget, user

    def wrap_command(self, command: Sequence[str]) -> list[str]:
        """Return the command of systemd-run that becomes the trainer."""
        manager = ["--user"] if self._user else []
        limits = ["-p", f"MemoryMax={self._budget}", "-p", "MemorySwapMax=0"]
        return ["systemd-run", *manager, "--scope", "--quiet", "--collect", *limits, "--", *command]

    def holds(self) -> bool:
        """Whether a command started so finds the limit in force."""
        if shutil.which("systemd-run") is None:
            return False
        with suppress(OSError, ValueError, subprocess.SubprocessError):
            command = self.wrap_command(["/bin/sh", "-c", _TELL])
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PROBE_SECONDS, check=True
            )
            return 0 <= self._budget - int(done.stdout) < 1 << 16
        return False

    def has_killed(self, held: int) -> bool:
        """Whether the trainer was near its budget: its scope, which would say so, is gone."""
        return held > _NEAR * self._budget

    def close(self) -> None:
        """Do nothing: the scope ends with its last process."""


def choose_trainer_limit(budget: int, wanted: str = "auto", tree: CgroupTree | None = None) -> TrainerLimit:
    """Return the strongest limit of ``budget`` bytes that this process may set.

    ``wanted`` is ``auto``, ``cgroup`` or ``process``. Raise DeviceError if it is ``cgroup`` and the system offers none.
    """
    if wanted == "process":
        return ProcessLimit()
    try:
        return GroupLimit((tree or find_cgroup_tree()).make_limited(budget))
    except CgroupError as error:
        scope = ScopeLimit(budget, user=os.geteuid() != 0)
        if scope.holds():
            return scope
        if wanted == "cgroup":
            raise DeviceError(
                f"--memory-limit cgroup: {error}; {_MEND}, or leave the option out for RLIMIT_DATA and a watchdog"
            ) from error
        return ProcessLimit(str(error))


def find_cgroup_tree() -> CgroupTree:
    """Return the groups of version 2, which some systems mount beside those of version 1."""
    root = Path("/sys/fs/cgroup")
    return CgroupTree(root if (root / "cgroup.controllers").exists() else root / "unified")
