"""A round under a hard limit of memory: requests above it fail, and a round that cannot do without them is declined."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedtune.accelerator import is_out_of_memory
from fedtune.device.held_memory import read_held_bytes
from fedtune.device.local_round import run_local_round
from fedtune.device.memory_budget import choose_micro_batch_size
from fedtune.errors import MemoryBudgetError
from fedtune.memory.limits import limit_private_memory
from fedtune.training import RunContext
from fedtune.wire.client_update import ClientReport, TrainRequest

__all__ = ["keep_within_budget", "run_limited_round"]


def run_limited_round(
    request: TrainRequest,
    state: Mapping[str, Tensor],
    context: RunContext,
    rows: NDArray[np.int64],
    folder: Path,
    budget: int,
) -> tuple[bytes, ClientReport]:
    """Run a client's round as a device with ``budget`` bytes of memory does: estimated before, and limited while it
    trains.
    """
    part = context.for_client(request.client)
    micro = None if request.scoring else choose_micro_batch_size(part, rows, request.round, budget)
    with keep_within_budget(budget, part.recipe.train.threads):
        return run_local_round(request, state, context, rows, folder, micro)


@contextmanager
def keep_within_budget(budget: int, threads: int = 1) -> Iterator[None]:
    """Keep this process, which computes with so many threads, within ``budget`` bytes in the block.

    A training step that does not fit halves its micro-batch. Raise MemoryBudgetError if that is not enough.
    """
    try:
        with limit_private_memory(budget - read_held_bytes(), threads):
            yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        allowed = round(budget / 1e6)
        raise MemoryBudgetError(
            f"training needs more than the {allowed} MB that this device allows; lower train.batch_size or "
            "train.max_length, or use a technique that keeps less",
            code="memory-training",
            counts={"allowed_mb": allowed},
        ) from error
