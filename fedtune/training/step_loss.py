"""The loss of one forward pass, with the terms of techniques, and the model's logits."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.accelerator import use_autocast
from fedtune.tasks import Task
from fedtune.techniques import collect_loss_terms

__all__ = ["capture_logits", "compute_step_loss"]


def compute_step_loss(task: Task, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the loss of a step: the task's loss plus the terms that techniques add inside the model."""
    with collect_loss_terms() as terms, use_autocast(model):
        loss = task.compute_loss(model, batch)
    return torch.stack([loss, *terms]).sum() if terms else loss


@contextmanager
def capture_logits(model: nn.Module, *, wanted: bool) -> Iterator[list[Tensor]]:
    """Collect the logits of the model's forward passes inside the block, if they are wanted."""
    found: list[Tensor] = []
    if not wanted:
        yield found
        return

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if isinstance(logits, Tensor):
            found.append(logits)

    handle = model.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()
