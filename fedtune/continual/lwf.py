"""LwF: the model keeps the probabilities that it gave old classes before the task, on the examples of the new one.

What: the loss gains strength * T^2 KL(softmax(z* / T) || softmax(z / T)). z* are the logits of the global model at the
last border, and only the classes that it knew take part. In a stream whose tasks have the same classes these are all;
a model that generates text keeps its distribution over the next token, at every real token.
Sends: nothing more up. Down, the trained tensors once more in every round after the first task. The teacher shares the
frozen base with the model, so a device holds the trained tensors twice. A step costs one more forward pass.
Use when: nothing of earlier tasks may be stored, and the new examples resemble the old ones.
Avoid when: inputs of tasks differ so much that the old model's answers to new examples say nothing. In a class stream
with ``loss: seen``, new classes still win over old ones: ``loss: new`` belongs to it, with a strength of about 1.
Source: Li, Hoiem, "Learning without Forgetting" (arXiv 1606.09282), equations 3 and 4; T^2: Hinton et al. (arXiv
1503.02531), section 2.1. Their three training phases are one here.
"""

import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fedtune.continual._anchor_checks import refuse_moving_base, refuse_other_techniques
from fedtune.continual._distillation import compute_distillation_loss, predict_with_teacher, select_real_tokens
from fedtune.continual._masked_head import find_head, list_classes
from fedtune.continual._method import Border, BorderResult, ContinualMethod, MethodRound, MethodSetup, Tensors
from fedtune.continual._plan import Place, StreamPlan
from fedtune.continual._tensor_groups import join_groups, select_group
from fedtune.errors import RecipeError
from fedtune.recipe.schema import Recipe
from fedtune.tasks import get_task

__all__ = ["Lwf"]

_GROUPS = "groups"
"""Memory [classes]: 0 for a class that the teacher does not know, else the group in which it is compared."""


class Lwf(ContinualMethod):
    """Distillation from the model of the last border on the examples of the new task."""

    name: ClassVar[str] = "lwf"

    strength: float = Field(1.0, ge=0, description="weight of the term; 0 trains without it")
    temperature: float = Field(2.0, gt=0)

    def check(self, recipe: Recipe) -> None:
        """Raise RecipeError if the model gives no distribution, or none that a step could compare."""
        refuse_moving_base(self.name, recipe)
        refuse_other_techniques(self.name, recipe)
        task = get_task(recipe.task)
        other = task.head_problem in ("regression", "multi_label_classification") or task.auto_class == "AutoModel"
        if other or task.needs_reference:
            raise RecipeError(
                f"stream.memory: lwf compares distributions over classes or tokens, but {task.name} is trained on "
                "something else; take another method"
            )
        if any(unit.name == "fused-cross-entropy" for unit in recipe.train.techniques):
            raise RecipeError(
                "stream.memory: lwf needs the logits of a training step, which fused-cross-entropy never has; drop one"
            )

    def begin_round(self, setup: MethodSetup) -> MethodRound:
        """Hold the teacher's tensors on the model's device."""
        return _LwfRound(self, setup)

    def after_task(self, border: Border) -> BorderResult:
        """Remember the state, and the classes that it knows."""
        plan = StreamPlan(border.recipe)
        teacher = {name: one.clone() for name, one in border.after.items() if one.is_floating_point()}
        memory = join_groups(teacher=teacher)
        tasks = plan.list_seen(border.round_number)
        if list_classes(plan, border.label_names, tasks) is not None:
            memory[_GROUPS] = _group_classes(plan, border.label_names, tasks)
        return BorderResult(border.after, memory)

    def list_sent_memory(self, memory: Tensors, place: Place) -> list[str]:
        """Everything, but nothing if the term is off."""
        return list(memory) if self.strength else []


class _LwfRound(MethodRound):
    """The distillation term in one client's round."""

    def __init__(self, method: Lwf, setup: MethodSetup) -> None:
        tensors = {**dict(setup.model.named_parameters()), **dict(setup.model.named_buffers())}
        self.method, self.model = method, setup.model
        self.teacher = {
            name: one.to(tensors[name].device, tensors[name].dtype)
            for name, one in select_group(setup.received, "teacher").items()
        }
        groups = setup.received.get(_GROUPS)
        self.groups = None if groups is None else [_find(groups, one) for one in range(1, int(groups.max()) + 1)]
        self.unmasked: Tensor | None = None
        if self.teacher and self.groups is not None:
            _watch_head(self, find_head(setup.model, setup.num_labels))

    def compute_batch_term(self, rows: Sequence[int], batch: Tensors, logits: Tensor | None) -> Tensor | None:
        """Return the weighted term; None in the first task."""
        if not self.teacher:
            return None
        student = logits if self.groups is None else self.unmasked
        assert student is not None
        teacher = predict_with_teacher(self.model, self.teacher, batch)
        if self.groups is not None:
            assert self.unmasked is not None
            teacher = self.unmasked
        student, teacher = select_real_tokens(student, batch), select_real_tokens(teacher, batch)
        compared: Sequence[list[int] | None] = self.groups or [None]
        terms = [compute_distillation_loss(student, teacher, self.method.temperature, one) for one in compared]
        return self.method.strength * torch.stack(terms).sum()


def _group_classes(plan: StreamPlan, label_names: Sequence[str], tasks: Sequence[int]) -> Tensor:
    """Return one group of all classes of the tasks, or one for each task if tasks are told apart when it is used."""
    groups = torch.zeros(len(label_names), dtype=torch.int64)
    for number, task in enumerate(tasks, 1):
        groups[list_classes(plan, label_names, [task])] = number if plan.stream.setting == "task" else 1
    return groups


def _find(groups: Tensor, number: int) -> list[int]:
    found: list[int] = (groups == number).nonzero()[:, 0].tolist()
    return found


def _watch_head(held: _LwfRound, head: nn.Module) -> None:
    """Keep the head's logits before classes are masked, as long as the round exists: it may train on new ones alone."""
    seen = weakref.ref(held)

    def keep(_: nn.Module, __: Any, logits: Tensor) -> None:
        found = seen()
        if found is not None:
            found.unmasked = logits

    weakref.finalize(held, head.register_forward_hook(keep).remove)
