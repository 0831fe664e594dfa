"""O-LoRA: each task of a stream trains its own low-rank pair in directions that the pairs of other tasks do not use.

What: y = W x + sum_t (alpha / rank) B_t A_t x. Only the present task's pair is trained, and a classifier's head. Its
loss gains overlap * sum_i sum_ab |A_i A_t^T|_ab, the entrywise L1 norm over the pairs of the tasks before it, so that
rows of A of different tasks become orthogonal.
Exactness: B_t is trained in odd rounds of a task and A_t in even ones, while the other factor is the same on all
clients. The mean of their updates is then the mean of their products. The paper trains both at once, on one machine.
Saves: what ``lora`` saves. Each task's pair costs its own products, so a step takes longer the more tasks there are.
Sends: down, the pairs of all tasks in each round. Up, one factor of one pair.
Use when: the tasks of a stream differ, and nothing of earlier ones may be stored. The number of tasks is known.
Avoid when: tasks have one round, in which A is never trained, or are so many that their ranks fill the width of the
layers. The term grows with rank, tasks and layers: search ``overlap`` for each model.
Source: Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning" (O-LoRA, arXiv 2310.14152),
equations 6 to 8, as in the authors' code, which takes the absolute value and not the square of each entry. The code's
second term, on the norms of A and B, is off by default there and left out here.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from fedtune.techniques._technique import StepInfo
from fedtune.techniques.low_rank._low_rank import list_lora_layers
from fedtune.techniques.low_rank._pair_overlap import compute_overlap
from fedtune.techniques.low_rank._task_pairs import CONFLICTS, TaskPairTechnique, Visit, get_pair_name

__all__ = ["OLora"]


class OLora(TaskPairTechnique):
    """A pair for each task, whose A is kept orthogonal to those of other tasks."""

    name: ClassVar[str] = "o-lora"
    fits_plain_blocks: ClassVar[bool] = True
    paged_base_problem: ClassVar[str | None] = None
    trained_factors: ClassVar[str] = "alternate"  # type: ignore[misc]
    allows_kv_cache: ClassVar[bool] = True
    conflicts_with: ClassVar[Mapping[str, str]] = {**CONFLICTS, "inf-lora": "both add a low-rank pair for each task"}

    overlap: float = Field(0.5, ge=0, description="weight of the term on A_i A_t^T")

    def find_trained_factor(self, visit: Visit) -> str:
        """B first: while it is zero, A has no gradient."""
        return "B" if visit.round % 2 else "A"

    def before_optimiser_step(self, model: nn.Module, step_info: StepInfo) -> float:
        """Add the gradient of the term, in rounds that train A."""
        visit = self.find_visit(step_info.round)
        others = [get_pair_name(task) for task in visit.seen if task != visit.task]
        if self.overlap and others and self.find_trained_factor(visit) == "A":
            for _, layer in list_lora_layers(model):
                present = layer.lora_A[get_pair_name(visit.task)].weight
                term = self.overlap * compute_overlap(present, [layer.lora_A[other].weight for other in others])
                [gradient] = torch.autograd.grad(term, [present])
                present.grad = gradient if present.grad is None else present.grad + gradient
        return step_info.lr
