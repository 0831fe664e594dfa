"""Control groups of version 2, which limit the memory of all processes in them. This module does not import torch.

A process may make one where its own group is delegated to it (a systemd unit or scope with ``Delegate=``), or anywhere
as root. Memory that a process took before it joined a group counts in its old one, so a trainer joins before it starts.
"""

import os
from contextlib import suppress
from pathlib import Path

__all__ = ["Cgroup", "CgroupError", "CgroupTree"]

_LEAF = "fedtune-device"
"""The group of this process, once groups beside it have limits: only leaves of the tree may hold processes."""
_TRAINER = "fedtune-trainer-"
"""Followed by the number of the device's process."""
_PAGE = 1 << 16
"""The kernel rounds a limit down to whole pages, which have at most so many bytes."""


class CgroupError(Exception):
    """No group can limit memory; the message says why."""


class Cgroup:
    """A group with a memory limit in bytes, which the kernel enforces. Its processes may not use swap."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self._limit = path, limit
        self._kills = 0

    def apply_limit(self) -> None:
        """Make the group if it is not there, and set the limit. Raise CgroupError if it does not hold."""
        try:
            self.make_folder()
            if not (self.path / "memory.max").exists():
                raise CgroupError(f"{self.path} has no memory.max")
            (self.path / "memory.max").write_text(str(self._limit))
            if (self.path / "memory.swap.max").exists():  # kernels without swap accounting have none
                (self.path / "memory.swap.max").write_text("0")
            holds = _is_about((self.path / "memory.max").read_text(), self._limit)
        except OSError as error:
            raise CgroupError(f"{self.path} cannot be limited ({error.strerror})") from error
        if not holds:
            raise CgroupError(f"{self.path} does not keep its memory.max")
        self._kills = self._count_kills()

    def make_folder(self) -> None:
        """Make the group; the kernel fills it with files."""
        self.path.mkdir(exist_ok=True)

    def has_killed(self) -> bool:
        """Whether the kernel killed a process of the group for its memory since the limit was set."""
        return self._count_kills() > self._kills

    def _count_kills(self) -> int:
        with suppress(OSError, ValueError):
            lines = (line.split() for line in (self.path / "memory.events").read_text().splitlines())
            return sum(int(words[1]) for words in lines if words[0] == "oom_kill")
        return 0

    def remove(self) -> None:
        """Remove the group if no process is left in it."""
        with suppress(OSError):
            self.path.rmdir()


class CgroupTree:
    """The groups of this machine: the file system at ``root``, and the file that names the group of this process."""

    def __init__(
        self, root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup"), uid: int | None = None
    ) -> None:
        self.root, self._membership = root, membership
        self._is_root = (os.geteuid() if uid is None else uid) == 0

    def make_limited(self, limit: int) -> Cgroup:
        """Return a new group for at most ``limit`` bytes; raise CgroupError with the reason if there can be none."""
        reasons: list[str] = []
        for parent in self._list_parents():
            try:
                self._enable_memory(parent)
                group = self.open_group(parent / f"{_TRAINER}{os.getpid()}", limit)
                group.apply_limit()
                self._remove_abandoned(parent)
                return group
            except CgroupError as error:
                reasons.append(str(error))
        raise CgroupError(reasons[0] if reasons else "this system has no control groups of version 2")

    def _remove_abandoned(self, parent: Path) -> None:
        """Remove the groups of devices that were killed."""
        for path in parent.glob(f"{_TRAINER}*"):
            if not Path("/proc", path.name.removeprefix(_TRAINER)).exists():
                self.open_group(path, 0).remove()

    def open_group(self, path: Path, limit: int) -> Cgroup:
        """Return the group at a path."""
        return Cgroup(path, limit)

    def _list_parents(self) -> list[Path]:
        """Return the group of this process, and as root also that of the whole machine."""
        if not (self.root / "cgroup.controllers").exists():
            return []
        own = self._find_own()
        found = ([] if own is None else [own]) + ([self.root] if self._is_root else [])
        return list(dict.fromkeys(found))

    def _find_own(self) -> Path | None:
        """Return the group of this process. If it moved to a leaf before, this is the leaf's parent."""
        with suppress(OSError):
            for line in self._membership.read_text().splitlines():
                if line.startswith("0::/"):
                    path = self.root / line.removeprefix("0::/").removesuffix(" (deleted)")
                    return path.parent if path.name == _LEAF else path
        return None

    def _enable_memory(self, parent: Path) -> None:
        """Let groups in ``parent`` have memory limits. Raise CgroupError if this process may not."""
        try:
            if "memory" not in (parent / "cgroup.controllers").read_text().split():
                raise CgroupError(f"the memory controller is not delegated to {parent}")
            if not os.access(parent, os.W_OK):
                raise CgroupError(f"this process may not make groups in {parent}")
            if "memory" not in (parent / "cgroup.subtree_control").read_text().split():
                self._delegate_memory(parent)
        except OSError as error:
            raise CgroupError(f"{parent} cannot be divided ({error.strerror})") from error

    def _delegate_memory(self, parent: Path) -> None:
        """Hand memory down from ``parent``. Only leaves hold processes, so this one moves to a leaf if it is there."""
        leaf = parent / _LEAF
        moves = parent == self._find_own() and (parent / "cgroup.type").exists()  # the group of the machine has none
        if moves:
            self.open_group(leaf, 0).make_folder()
            (leaf / "cgroup.procs").write_text(str(os.getpid()))
        try:
            (parent / "cgroup.subtree_control").write_text("+memory")
        except OSError:  # other processes are in the group too
            if moves:
                (parent / "cgroup.procs").write_text(str(os.getpid()))
                self.open_group(leaf, 0).remove()
            raise


def _is_about(text: str, limit: int) -> bool:
    found = text.strip()
    return found.isdecimal() and limit - _PAGE < int(found) <= limit
