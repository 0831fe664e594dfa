"""The head of a class stream: all classes have a row from the start, and logits of classes not yet seen are -inf.

Such a class has probability 0, and its row a gradient of exactly 0. The loss and the other gradients are those of a
head that grows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedtune.continual._plan import StreamPlan
from fedtune.continual._stream_rows import list_tasks
from fedtune.errors import ModelError

__all__ = ["find_head", "list_classes", "mask_classes"]

_ACTIVE: WeakKeyDictionary[nn.Module, list[Tensor]] = WeakKeyDictionary()
"""The masks of the blocks that a model is in, the innermost last."""


def list_classes(
    plan: StreamPlan, label_names: Sequence[str], tasks: Sequence[int], *, neighbours: bool = False
) -> list[int] | None:
    """Return the numbers of the classes of some tasks; None in a stream whose tasks have the same classes.

    With ``neighbours``, and a stream whose borders are blurred, those of the tasks before and after are included.
    """
    if plan.stream.setting not in ("class", "task"):
        return None
    wider = {task + step for task in tasks for step in (-1, 0, 1)} if neighbours and plan.stream.blur else set(tasks)
    named = dict(enumerate(visit.where or [visit.name] for visit in list_tasks(plan)))
    numbers = {name: number for number, name in enumerate(label_names)}
    return sorted(numbers[name] for task in wider for name in named.get(task, []) if name in numbers)


def find_head(model: nn.Module, num_labels: int) -> nn.Module:
    """Return the last layer of a classifier; ModelError if the model has none with so many outputs."""
    found = {name: one for name, one in model.named_modules() if getattr(one, "out_features", None) == num_labels}
    layers = [one for name, one in found.items() if not any(name.startswith(f"{other}.") for other in found)]
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no last layer with {num_labels} outputs, so a stream cannot hide its classes; "
            "choose another model, or setting: domain"
        )
    last: nn.Module = layers[-1]
    return last


@contextmanager
def mask_classes(model: nn.Module, classes: Sequence[int] | None, num_labels: int) -> Iterator[None]:
    """Let a classifier predict only ``classes`` inside the block; None for all of them.

    Of nested blocks, the innermost one counts.
    """
    if (classes is None or len(classes) == num_labels) and not _ACTIVE.get(model):
        yield
        return
    hidden = torch.ones(num_labels, dtype=torch.bool)
    hidden[list(range(num_labels) if classes is None else classes)] = False
    masks = _ACTIVE.setdefault(model, [])

    def hide(_: nn.Module, __: Any, logits: Tensor) -> Tensor:
        return logits.masked_fill(hidden.to(logits.device), -torch.inf) if masks[-1] is hidden else logits

    handle = find_head(model, num_labels).register_forward_hook(hide)
    masks.append(hidden)
    try:
        yield
    finally:
        handle.remove()
        masks.pop()
