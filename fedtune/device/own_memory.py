"""What a device remembers of earlier tasks: one file for each visit to a task, in the folder of the run.

What an algorithm and error feedback keep has files of its own, one for each round, which takes the place of the visit.

The file of a visit is written at the end of each of its rounds and read only in later visits, so that a round that is
begun again finds what it found the first time. The files of the newest two visits are kept. All files together, also
one that is being written, stay within a budget of bytes. For this, a file has at most half of it.
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from fedtune.device.memory_file import MOST_ENCRYPTED_BYTES, decode_memory, encode_memory, make_mark
from fedtune.device.memory_key import get_key_path, load_or_create_memory_key
from fedtune.errors import MemoryBudgetError, StoreError
from fedtune.files import write_bytes_atomically

__all__ = ["ALGORITHM_PREFIX", "FEEDBACK_PREFIX", "MemoryFolder", "delete_own_memory", "delete_unneeded_memory"]

TASK_PREFIX, ALGORITHM_PREFIX, FEEDBACK_PREFIX = "memory", "algorithm", "feedback"
_ENDED = "memory-ended"
"""A file that says that the device has trained in the last round of the stream."""


@dataclass(frozen=True)
class MemoryFolder:
    """The memory of one device in one run.

    ``budget`` is in bytes, None for no limit. Without a ``key``, files are not encrypted; then the key of the folder
    tells whose they are.
    """

    folder: Path
    run_id: str
    budget: int | None = None
    key: bytes | None = field(default=None, repr=False)
    prefix: str = TASK_PREFIX
    """How the names of its files begin."""

    @property
    def file_limit(self) -> float:
        """The most bytes of a file: that of an earlier visit and that of this one share the budget."""
        half = math.inf if self.budget is None else self.budget // 2
        return half if self.key is None else min(half, MOST_ENCRYPTED_BYTES)

    def read_earlier(self, visit: int) -> dict[int, dict[str, Tensor]]:
        """Return what the newest earlier visit stored, by its number; an empty dict if there was none.

        Raise StoreError for a file that was changed, or is from another run, visit or key.
        """
        earlier = [number for number in self._list_visits() if number < visit]
        if not earlier:
            return {}
        path = self._get_path(earlier[-1])
        try:
            content = _read_bytes(path, self.budget)
            return {earlier[-1]: decode_memory(content, self._make_mark(earlier[-1]), self.key)}
        except StoreError as error:
            raise StoreError(
                f"{path} {error}; delete it to start this run's memory anew", code="memory-damaged"
            ) from error

    def write(self, visit: int, tensors: Mapping[str, Tensor]) -> int:
        """Write the file of a visit, and return its size in bytes.

        Raise MemoryBudgetError if it is too large; then the files stay as they are.
        """
        content = encode_memory(tensors, self._make_mark(visit), self.key)
        self._require_size(len(content))
        self._make_room(visit, len(content))
        write_bytes_atomically(self._get_path(visit), content)
        return len(content)

    def require_disk_room(self) -> None:
        """Raise MemoryBudgetError if the disk has no room for what the budget still allows to write."""
        missing = 0 if self.budget is None else self.budget - self.count_bytes()
        free = shutil.disk_usage(_find_existing(self.folder)).free
        if missing > free:
            raise MemoryBudgetError(
                f"this device may store {missing} more bytes for the run, but its disk has {free} left in "
                f"{self.folder}; free some",
                code="storage-short",
                counts={"needed_kb": -(-missing // 1000), "free_kb": free // 1000},
            )

    def mark_ended(self) -> None:
        """Note that no later round reads the memory. It stays, because the last round may be begun again."""
        (self.folder / _ENDED).touch()

    def count_bytes(self) -> int:
        """Return the bytes of all files, also of one that a killed process left half-written."""
        return sum(path.stat().st_size for path in _list_files(self.folder, self.prefix))

    def forget_unmerged(self, merged: int, visit: int) -> None:
        """Delete the files of visits after ``merged`` and before ``visit``, whose results the server did not use."""
        for number in self._list_visits():
            if merged < number < visit:
                self._get_path(number).unlink(missing_ok=True)

    def _get_path(self, visit: int) -> Path:
        return self.folder / f"{self.prefix}-{visit:04d}.safetensors"

    def _list_visits(self) -> list[int]:
        names = (path.stem.removeprefix(f"{self.prefix}-") for path in self.folder.glob(f"{self.prefix}-*.safetensors"))
        return sorted(int(name) for name in names if name.isdecimal())

    def _make_mark(self, visit: int) -> str:
        return make_mark(self.run_id, visit, load_or_create_memory_key(self.folder) if self.key is None else b"")

    def _require_size(self, size: int) -> None:
        if size > self.file_limit:
            limit = int(self.file_limit)
            raise MemoryBudgetError(
                f"what this device stores of a task takes {size} bytes, and it may take {limit}, half of the budget; "
                f"raise stream.own_memory.budget to {2 * size}, or let stream.memory store less",
                code="storage-exceeded",
                counts={"needed_kb": -(-size // 1000), "allowed_kb": limit // 1000},
            )

    def _make_room(self, visit: int, size: int) -> None:
        """Delete what is not needed any more, and the visit's own older file if it does not fit beside the new one.

        Nothing is lost with the latter: only later visits read it, and the round that writes it anew is under way.
        """
        earlier = [number for number in self._list_visits() if number < visit][-1:]
        needed = {self._get_path(number) for number in (*earlier, visit)}
        for path in _list_files(self.folder, self.prefix):
            if path not in needed:
                path.unlink(missing_ok=True)
        if self.budget is not None and self.count_bytes() + size > self.budget:
            self._get_path(visit).unlink(missing_ok=True)


def delete_own_memory(folder: Path) -> None:
    """Delete all files of a folder, the key first: without it, encrypted files that remain are worthless."""
    get_key_path(folder).unlink(missing_ok=True)
    files = [
        path for prefix in (TASK_PREFIX, ALGORITHM_PREFIX, FEEDBACK_PREFIX) for path in _list_files(folder, prefix)
    ]
    for path in (*files, folder / _ENDED):
        path.unlink(missing_ok=True)


def delete_unneeded_memory(folder: Path) -> None:
    """Delete the memory of other runs that have ended, whose folders are beside ``folder``."""
    for mark in folder.parent.glob(f"*/{_ENDED}"):
        if mark.parent != folder:
            delete_own_memory(mark.parent)


def _read_bytes(path: Path, most: int | None) -> bytes:
    """Return the content of a file. A longer one than the budget is none of ours, and is not read."""
    try:
        with path.open("rb") as file:
            content = file.read(-1 if most is None else most + 1)
    except OSError as error:
        raise StoreError(f"cannot be read ({error.strerror})") from error
    if most is not None and len(content) > most:
        raise StoreError(f"is larger than the budget of {most} bytes")
    return content


def _list_files(folder: Path, prefix: str) -> list[Path]:
    """Return all files of the memory, also those that a killed process left half-written."""
    return [*folder.glob(f"{prefix}-*.safetensors"), *folder.glob(f".{prefix}-*.part")]


def _find_existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())
