"""A file without a name for activations. Backward reads them once, and they are gone.

The file is unlinked before anything is written, so no other program opens it by name, and the system frees it when the
process ends, however it ends. Blocks that were written stay on the disk until they are overwritten; encryption with a
key that is only in memory makes them unreadable.
"""

import os
import tempfile
import warnings
import weakref
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from fedtune.errors import FedtuneWarning
from fedtune.techniques._codecs.page_cipher import PageCipher

__all__ = ["ActivationFile", "Slot"]


class Slot(NamedTuple):
    """Where the bytes of a tensor lie. ``number`` is never used twice."""

    offset: int
    size: int
    number: int


@dataclass(eq=False)
class ActivationFile:
    """Holds bytes in ``folder``, by default that for temporary files, and writes at most ``max_bytes``.

    ``written_bytes`` counts what was handed to the system since ``begin_count``. What is read and released soon may
    never reach the disk.
    """

    folder: str | None
    is_encrypted: bool
    max_bytes: int
    written_bytes: int = 0
    _file: IO[bytes] | None = field(default=None, init=False)
    _process: int = field(default=0, init=False)
    _cipher: PageCipher | None = field(default=None, init=False)
    _end: int = field(default=0, init=False)
    _live: set[int] = field(default_factory=set, init=False)
    _number: int = field(default=0, init=False)
    _is_full: bool = field(default=False, init=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has a file of its own."""
        return ActivationFile, (self.folder, self.is_encrypted, self.max_bytes)

    def begin_count(self) -> None:
        """Allow ``max_bytes`` again."""
        self.written_bytes, self._is_full = 0, False

    def write(self, flat: Tensor) -> Slot | None:
        """Write the bytes of a uint8 tensor [n]. Return None if the bound is reached or the disk takes no more."""
        if self._is_full:
            return None
        if self.written_bytes + len(flat) > self.max_bytes:
            self._stop(f"{self.written_bytes} bytes were written in this round, and max_gib_per_round is reached")
            return None
        try:
            self._get_descriptor()  # a new file is empty
            slot = Slot(self._end, len(flat), self._number)
            self._write_all(slot, flat.cpu())
        except OSError as error:
            self._stop(f"the file of activations cannot be written ({error.strerror})")
            return None
        self._live.add(slot.number)
        self._end, self._number = slot.offset + slot.size, self._number + 1
        self.written_bytes += slot.size
        return slot

    def read(self, slot: Slot) -> Tensor:
        """Return the bytes [n] of a slot."""
        flat = torch.empty(slot.size, dtype=torch.uint8)
        view, done = memoryview(flat.numpy().data), 0
        while done < slot.size:
            count = os.preadv(self._get_descriptor(), [view[done:]], slot.offset + done)
            if not count:
                raise RuntimeError(f"the file of activations ends before byte {slot.offset + slot.size}")
            done += count
        if self._cipher is not None:
            flat = torch.frombuffer(bytearray(self._cipher.apply(view, slot.number)), dtype=torch.uint8)
        return flat

    def release(self, slot: Slot) -> None:
        """Forget a slot. The file is emptied with the last one, so that pages not yet written need not be."""
        if slot.number not in self._live or self._process != os.getpid():
            return
        self._live.remove(slot.number)
        if not self._live and self._file is not None:
            self._end = 0
            os.ftruncate(self._file.fileno(), 0)

    def _write_all(self, slot: Slot, content: Tensor) -> None:
        view = memoryview(content.numpy().data)
        if self._cipher is not None:
            view = memoryview(self._cipher.apply(view, slot.number))
        done = 0
        while done < slot.size:
            done += os.pwrite(self._get_descriptor(), view[done:], slot.offset + done)

    def _get_descriptor(self) -> int:
        """Open the file on first use, and again in a forked process: it must not write into its parent's."""
        if self._file is None or self._process != os.getpid():
            self._file = tempfile.TemporaryFile(prefix="fedtune-activations-", dir=self.folder)  # noqa: SIM115 - closed below
            weakref.finalize(self, self._file.close).atexit = False
            self._process, self._end, self._live = os.getpid(), 0, set()
            self._cipher = PageCipher() if self.is_encrypted else None
        return self._file.fileno()

    def _stop(self, why: str) -> None:
        self._is_full = True
        warnings.warn(f"offload: {why}; activations stay in memory until the next round", FedtuneWarning, stacklevel=2)
