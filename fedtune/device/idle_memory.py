"""What a trainer lets go of while it waits."""

import gc

from fedtune.memory.heap import release_freed
from fedtune.models.paging.paged_matrix import release_buffers
from fedtune.training import RunContext

__all__ = ["release_idle_memory"]


def release_idle_memory(context: RunContext) -> None:
    """Return to the system what the trainer can make again: the tokenizer, the buffers of a store and freed blocks.

    The examples are encoded before, so the tokenizer is rarely made again. A vocabulary of 49 thousand takes 28 MB.
    """
    _ = context.train
    vars(context).pop("reader", None)
    release_buffers()
    gc.collect()
    release_freed()
