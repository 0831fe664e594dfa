"""The folder of a merge: files have their final size from the start, are filled in place and renamed at the end.

A journal lists the tensors that are on disk, under a hash of the configuration and the inputs. The same command
continues after them.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from filelock import FileLock, Timeout
from torch import Tensor

from fedtune.errors import FedtuneError, StoreError
from fedtune.files import write_bytes_atomically
from fedtune.offline_merge.safetensors_layout import TensorInfo, TensorLocation, build_file_layout, write_rows

__all__ = ["MergeOutput", "OutputFolder", "check_output_space", "open_output_folder"]

_JOURNAL = "journal"
_SAFE_EVERY = 64_000_000
"""Bytes after which what was written is forced to disk and noted."""


class MergeOutput(Protocol):
    """Where the tensors of a result are written."""

    finished_tensors: set[str]

    def write_rows(self, name: str, start: int, rows: Tensor) -> None:
        """Cast rows and put them into their place."""

    def mark_finished(self, name: str) -> None:
        """Note that a tensor is complete."""

    def flush(self) -> None:
        """Keep what was written."""


class OutputFolder:
    """The tensors of a folder that is being filled."""

    def __init__(self, folder: Path, shards: Mapping[str, Mapping[str, TensorInfo]], key: str) -> None:
        self.folder = folder
        self._layout = {file: build_file_layout(forms) for file, forms in shards.items()}
        self._file_of = {name: file for file, forms in shards.items() for name in forms}
        self._open: dict[str, IO[bytes]] = {}
        self._pending: list[str] = []
        self._bytes = 0
        resumed = self._resumed(key)
        if resumed is None:
            self._start(key)
        self.finished_tensors: set[str] = resumed or set()
        self._journal = (folder / _JOURNAL).open("a", encoding="utf-8")

    def write_rows(self, name: str, start: int, rows: Tensor) -> None:
        """Cast rows and write them to their place."""
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = (self.folder / file).open("r+b", buffering=0)
        write_rows(self._open[file], self._place(name), start, rows)

    def mark_finished(self, name: str) -> None:
        """Note that a tensor is complete. It counts once it is on disk."""
        self._pending.append(name)
        self._bytes += self._place(name).form.num_bytes
        if self._bytes >= _SAFE_EVERY:
            self.flush()

    def flush(self) -> None:
        """Force all data to disk, then write the journal."""
        for file in self._open.values():
            os.fdatasync(file.fileno())
        self._journal.writelines(f"{name}\n" for name in self._pending)
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self._pending, self._bytes = [], 0

    def close(self) -> None:
        """Close all files."""
        for file in self._open.values():
            file.close()
        self._journal.close()
        self._open = {}

    def _place(self, name: str) -> TensorLocation:
        return self._layout[self._file_of[name]][1][name]

    def _resumed(self, key: str) -> set[str] | None:
        """Return the tensors that an interrupted merge with the same key finished; None if there was none."""
        try:
            lines = (self.folder / _JOURNAL).read_text(encoding="utf-8").splitlines(keepends=True)
            sizes = {file: (self.folder / file).stat().st_size for file in self._layout}
        except (OSError, UnicodeDecodeError):
            return None
        if not lines or lines[0] != f"{key}\n" or any(sizes[file] != made[2] for file, made in self._layout.items()):
            return None
        return {line[:-1] for line in lines[1:] if line.endswith("\n")} & self._file_of.keys()

    def _start(self, key: str) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for file, (head, _, size) in self._layout.items():
            with (self.folder / file).open("wb") as opened:
                opened.write(head)
                _reserve(opened, size)
        write_bytes_atomically(self.folder / _JOURNAL, f"{key}\n".encode())


def _reserve(file: IO[bytes], size: int) -> None:
    """Reserve the file's space on disk now, so that it cannot run out later."""
    if hasattr(os, "posix_fallocate"):
        file.flush()
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)


@contextmanager
def open_output_folder(
    wanted: Path, shards: Mapping[str, Mapping[str, TensorInfo]], key: str
) -> Iterator[OutputFolder]:
    """Yield a folder beside the wanted one, and rename it when the block succeeds.

    After an interruption the folder stays, and the same command continues. After an error it is deleted. Raises
    StoreError if the folder exists, another process fills it, or the disk is full.
    """
    check_output_space(wanted, shards)
    beside = wanted.absolute().with_name(f".{wanted.name}.merging")
    lock = beside.with_name(f"{beside.name}.lock")
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=0):
            yield from _filled(wanted, beside, shards, key)
            lock.unlink(missing_ok=True)
    except Timeout as error:
        raise StoreError(f"another process is writing {wanted}; wait for it or choose another folder") from error
    except OSError as error:
        raise StoreError(f"cannot write {wanted}: {error.strerror}; free or choose another place") from error


def _filled(
    wanted: Path, beside: Path, shards: Mapping[str, Mapping[str, TensorInfo]], key: str
) -> Iterator[OutputFolder]:
    try:
        output = OutputFolder(beside, shards, key)
        try:
            yield output
            output.flush()
        finally:
            output.close()
    except (FedtuneError, OSError):
        shutil.rmtree(beside, ignore_errors=True)
        beside.with_name(f"{beside.name}.lock").unlink(missing_ok=True)
        raise
    (beside / _JOURNAL).unlink()
    beside.replace(wanted)


def check_output_space(wanted: Path, shards: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    """Raise StoreError if the folder exists or the disk has too little space."""
    if wanted.exists():
        raise StoreError(f"{wanted} exists already; choose another folder with -o")
    place = next(parent for parent in wanted.absolute().parents if parent.exists())
    needed = sum(form.num_bytes for forms in shards.values() for form in forms.values())
    beside = wanted.absolute().with_name(f".{wanted.name}.merging")
    taken = sum(file.stat().st_size for file in beside.glob("*.safetensors"))
    free = shutil.disk_usage(place).free + taken
    if needed > free:
        raise StoreError(
            f"{wanted} needs {needed / 1e9:.2f} GB, but {place} has {free / 1e9:.2f} GB free; free some or choose "
            "another place with -o"
        )
