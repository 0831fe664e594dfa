"""Sets the number of CPU threads of torch."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["use_cpu_threads"]


@contextmanager
def use_cpu_threads(count: int) -> Iterator[None]:
    """Use ``count`` CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
