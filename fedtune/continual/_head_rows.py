"""The rows of a classifier's head that belong to classes: those of new classes, and each class's own row."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from fedtune.continual._masked_head import find_head, list_classes
from fedtune.continual._method import Border
from fedtune.continual._plan import StreamPlan

__all__ = ["copy_rows", "find_head_tensors", "keep_new_rows", "list_earlier_classes", "list_new_classes"]

Tensors = Mapping[str, Tensor]


def find_head_tensors(model: nn.Module, num_labels: int, names: Sequence[str]) -> list[str]:
    """Return those of ``names`` that have a row per class in the model's head."""
    own = {id(parameter) for parameter in find_head(model, num_labels).parameters()}
    parameters = dict(model.named_parameters())
    return [
        name
        for name in names
        if name in parameters and id(parameters[name]) in own and parameters[name].shape[:1] == (num_labels,)
    ]


def list_earlier_classes(plan: StreamPlan, label_names: Sequence[str], visit: int) -> list[int] | None:
    """Return the classes of all visits before one; None in a stream whose tasks have the same classes."""
    tasks = sorted({plan.find_task(number) for number in range(visit)})
    return list_classes(plan, label_names, tasks, neighbours=True)


def list_new_classes(plan: StreamPlan, label_names: Sequence[str], visit: int) -> list[int]:
    """Return the classes that come first in a visit; none in a stream whose tasks have the same classes."""
    earlier = list_earlier_classes(plan, label_names, visit)
    current = list_classes(plan, label_names, [plan.find_task(visit)], neighbours=True)
    return [] if earlier is None or current is None else sorted(set(current) - set(earlier))


def copy_rows(state: Tensors, source: Tensors, names: Sequence[str], rows: Sequence[int]) -> dict[str, Tensor]:
    """Return the state with some rows of the named tensors from another one."""
    found = dict(state)
    for name in names if rows else []:
        found[name] = found[name].clone()
        found[name][list(rows)] = source[name][list(rows)].to(found[name].dtype)
    return found


def keep_new_rows(border: Border, state: Tensors) -> Tensors:
    """Return a border's next state with the head's rows of new classes as they were trained."""
    rows = list_new_classes(StreamPlan(border.recipe), border.label_names, border.visit)
    if not rows:
        return state
    names = find_head_tensors(border.model, len(border.label_names), list(state))
    return copy_rows(state, border.after, names, rows)
