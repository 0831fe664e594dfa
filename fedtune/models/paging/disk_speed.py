"""How long reading takes in a step, if memory cannot hold the file of a store."""

import time
import warnings
from collections.abc import Sequence

import psutil
import torch

from fedtune.errors import FedtuneWarning
from fedtune.models.paging.byte_readers import ByteReader, FileBytes
from fedtune.models.paging.paged_matrix import PagedMatrix

__all__ = ["measure_bytes_per_second", "warn_of_slow_disk"]

_SAMPLE = 32 << 20
_PASSES = 3
"""Forward, again in the backward pass with checkpointing or meft, and backward."""
_SLOW = 20.0


def warn_of_slow_disk(matrices: Sequence[PagedMatrix], slow: float = _SLOW) -> None:
    """Warn if reading alone takes longer than ``slow`` seconds in each step. A file that fits the memory is not tried.

    The matrices share a reader.
    """
    size = sum(matrix.nbytes for matrix in matrices)
    if not matrices or not isinstance(matrices[0].reader, FileBytes) or size < psutil.virtual_memory().available:
        return
    speed = measure_bytes_per_second(matrices[0].reader, min(size, _SAMPLE))
    if (seconds := _PASSES * size / speed) > slow:
        warnings.warn(
            f"model.paged reads up to {_PASSES * size / 1e6:,.0f} MB in each step, which takes about {seconds:,.0f} "
            f"seconds at the {speed / 1e6:,.0f} MB/s of {matrices[0].reader.path.parent}; set FEDTUNE_CACHE to a "
            "faster disk, or take paged: nf4",
            FedtuneWarning,
            stacklevel=2,
        )


def measure_bytes_per_second(reader: ByteReader, size: int) -> float:
    """Return the speed at which the first ``size`` bytes come from the disk. They do not count as read."""
    sample = torch.empty(size, dtype=torch.uint8)
    before = reader.bytes_read
    if isinstance(reader, FileBytes):
        reader.drop_cached_pages(size)
    start = time.perf_counter()
    reader.read_into(sample, 0)
    reader.bytes_read = before
    return size / max(time.perf_counter() - start, 1e-9)
