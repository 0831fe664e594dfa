"""Where the bytes of a store come from: its file, or a copy of it in memory to compare with."""

import os
import weakref
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedtune.errors import SourceError

__all__ = ["ByteReader", "FileBytes", "HeldBytes"]


class ByteReader(ABC):
    """Copies ranges of bytes into tensors and counts them."""

    bytes_read = 0

    def read_into(self, target: Tensor, offset: int) -> None:
        """Fill a contiguous tensor with the bytes that begin at ``offset``."""
        self._copy(target.view(-1).view(torch.uint8).numpy().data, offset)
        self.bytes_read += target.nbytes

    @abstractmethod
    def prefetch_bytes(self, offset: int, size: int) -> None:
        """Say that a range is read next."""

    @abstractmethod
    def _copy(self, target: memoryview, offset: int) -> None:
        """Fill ``target``; SourceError if there are too few bytes."""


class HeldBytes(ByteReader):
    """The whole file in memory."""

    def __init__(self, path: Path) -> None:
        self._content = path.read_bytes()

    def prefetch_bytes(self, offset: int, size: int) -> None:
        """Do nothing: the range is in memory."""

    def _copy(self, target: memoryview, offset: int) -> None:
        target[:] = self._content[offset : offset + len(target)]


class FileBytes(ByteReader):
    """The file, through the system's cache of pages, which drops them when memory is short.

    Reads name their position, so that processes and threads may share the descriptor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._descriptor)
        self._changed = os.fstat(self._descriptor).st_mtime_ns

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker process opens the file itself."""
        return FileBytes, (self.path,)

    def prefetch_bytes(self, offset: int, size: int) -> None:
        """Let the system read ahead."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, max(0, offset), size, os.POSIX_FADV_WILLNEED)

    def drop_cached_pages(self, size: int) -> None:
        """Drop the first ``size`` bytes from the system's cache, to measure the disk."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, size, os.POSIX_FADV_DONTNEED)

    def _copy(self, target: memoryview, offset: int) -> None:
        if os.fstat(self._descriptor).st_mtime_ns != self._changed:
            raise SourceError(f"{self.path} was changed while it was in use; start again, so that it is checked anew")
        done = 0
        while done < len(target):
            found = os.preadv(self._descriptor, [target[done:]], offset + done)
            if not found:
                raise SourceError(f"{self.path} was cut short; delete its folder, and it is made again")
            done += found
