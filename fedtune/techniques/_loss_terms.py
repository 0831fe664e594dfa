"""Loss terms that arise inside the model: layers add them, and the training step adds them to the task's loss.

A layer may run several times in one step (checkpointing, reversible blocks). The code that reruns a layer collects the
terms of that run. Terms that are not collected are dropped.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

__all__ = ["add_loss_term", "collect_loss_terms"]

_terms: ContextVar[list[Tensor] | None] = ContextVar("terms", default=None)


@contextmanager
def collect_loss_terms() -> Iterator[list[Tensor]]:
    """Collects the terms that are added inside the block, in order; of nested blocks, the innermost one collects."""
    collected: list[Tensor] = []
    token = _terms.set(collected)
    try:
        yield collected
    finally:
        _terms.reset(token)


def add_loss_term(term: Tensor) -> None:
    """Add a weighted scalar to the loss of the current step, if there is one."""
    collected = _terms.get()
    if collected is not None:
        collected.append(term)
