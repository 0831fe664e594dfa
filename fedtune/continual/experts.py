"""Experts: train a model per task, and merge all of them into one after each task.

What: tau_t = theta_t - theta_0 is what task t changed, against the state before any training. The model after t tasks
is theta_0 plus the merge of tau_1, .., tau_t by ``merge``: a step that combines several models, for example mean, ties,
magmax or opcm. With ``start: independent``, each task is trained from theta_0. With ``sequential``, it is trained from
the end of the task before, which is not the merged model. In a class stream, each class has the row of the head that
its own task trained.
Memory: on the server one task vector per task, or one in all for ``magmax``; with ``sequential`` one state more.
Nothing on devices. Nothing more is sent.
Use when: a class stream starts from pretrained weights, stored examples are forbidden, and you can compare with the
naive stream, which is the only way to know.
Avoid when: the start is untrained, so that experts have nothing in common. Measured on ten digits, two at a time, over
three seeds (benchmarks/continual_merges.py): 32.9 % at the end for the mean of independent experts and 50.0 % for the
naive stream. Within a task, the state that is scored and kept is that of the expert in training.
Adapters: the pairs need a common A: ``lora: {trained_factors: b-only}`` with mean or task-arithmetic. Steps that
select entries or directions are refused for one factor.
Source: task vectors, Ilharco et al. (arXiv 2212.04089), section 2. Sequential: Marczak et al. (arXiv 2407.06322), whose
tau_t are against theta_0 too. Ours: the vectors of a federation's tasks. A task that comes again replaces its vector;
``magmax`` cannot forget the first one and takes the larger entries of both.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from fedtune.continual._border_checks import refuse_masks, refuse_moving_pairs, refuse_one_factor
from fedtune.continual._expert_merge import build_expert_merge, check_task_count
from fedtune.continual._head_rows import copy_rows, find_head_tensors
from fedtune.continual._masked_head import list_classes
from fedtune.continual._method import Border, BorderResult, ContinualMethod, Tensors
from fedtune.continual._plan import StreamPlan
from fedtune.continual._task_vectors import compute_task_vector, merge_task_vectors
from fedtune.continual._tensor_groups import join_groups, select_group
from fedtune.merging.combine.task_vectors.magmax import Magmax, keep_larger
from fedtune.recipe.schema import Recipe, Unit

__all__ = ["Experts"]


class Experts(ContinualMethod):
    """Merges one expert per task."""

    name: ClassVar[str] = "experts"
    needs_common_border: ClassVar[bool] = True
    consolidates: ClassVar[bool] = True
    merge: list[Unit] = Field([Unit(name="mean")], min_length=1, description="how task vectors are merged")
    start: Literal["independent", "sequential"] = Field(
        "independent", description="where a task's training starts: theta_0, or the end of the task before"
    )

    def check(self, recipe: Recipe) -> None:
        """Raise RecipeError if the merge cannot take task vectors, or what is trained has none."""
        refuse_masks(self.name, recipe)
        refuse_moving_pairs(self.name, recipe)
        combine = build_expert_merge(self.merge).combine
        if combine.selects_entries:
            refuse_one_factor(f"{self.name} with {combine.name}", "depends on how a product is factored", recipe)
        check_task_count(combine, recipe)

    def start_task(self, start: Tensors, state: Tensors, memory: Tensors) -> Tensors:
        """Return theta_0, or the end of the expert before."""
        return start if self.start == "independent" else select_group(memory, "end")

    def after_task(self, border: Border) -> BorderResult:
        """Merge the experts so far, with each class's own row of the head."""
        vectors = self._add_vector(border)
        head = self._add_rows(border)
        state = border.after if border.visit == 0 else self._merge(border, vectors, head)
        end = dict(border.after) if self.start == "sequential" else {}
        groups = {f"task-{number:04d}": vector for number, vector in vectors.items()}
        return BorderResult(state, join_groups(head=head, end=end, **groups))

    def _add_vector(self, border: Border) -> dict[int, dict[str, Tensor]]:
        """Return the vectors of all tasks so far, by task; magmax has a single one."""
        numbers = sorted({int(name[5:9]) for name in border.memory if name.startswith("task-")})
        vectors = {number: select_group(border.memory, f"task-{number:04d}") for number in numbers}
        vector = compute_task_vector(border.start, border.after)
        if not isinstance(build_expert_merge(self.merge).combine, Magmax):
            return vectors | {border.task: vector}
        running = vectors.get(0, vector)
        return {0: {name: keep_larger(running[name], tensor) for name, tensor in vector.items()}}

    def _add_rows(self, border: Border) -> dict[str, Tensor]:
        """Return the head with the rows of this task's classes; nothing if tasks have the same classes."""
        rows = list_classes(StreamPlan(border.recipe), border.label_names, [border.task])
        if rows is None:
            return {}
        names = find_head_tensors(border.model, len(border.label_names), list(border.after))
        head = select_group(border.memory, "head") or {name: border.after[name] for name in names}
        return copy_rows(head, border.after, names, rows)

    def _merge(self, border: Border, vectors: dict[int, dict[str, Tensor]], head: Tensors) -> Tensors:
        pipeline, ordered = build_expert_merge(self.merge), [vectors[number] for number in sorted(vectors)]
        merged = merge_task_vectors(pipeline, border.start, ordered, border.round_number)
        plan = StreamPlan(border.recipe)
        seen = sorted({plan.find_task(visit) for visit in range(border.visit + 1)})
        rows: Sequence[int] = list_classes(plan, border.label_names, seen) or []
        return copy_rows(merged, head, list(head), rows)
