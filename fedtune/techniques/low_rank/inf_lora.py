"""InfLoRA: each task of a stream trains a low-rank pair whose A is designed off the inputs of earlier tasks, and fixed.

What: y = W x + sum_t (alpha / rank) B_t A_t x. Only B of the present task's pair is trained, and a classifier's head.
``stream.memory: [dual-gpm]`` remembers the subspace M of earlier tasks' inputs and writes A_t, so that A_t M = 0: what
an earlier task passes through the layer stays as it was, except for its small part outside M.
Exactness: A_t is the same on all clients and fixed, so the mean of B_t gives the mean of the products.
Design: half of A's rows are random directions off M, set when the task begins. The clients measure the inputs of the
new task in its first round, and the other half become the strongest directions of these inputs off M. So no round is
spent on measuring. A task with one round has random directions only. The paper measures before it trains.
Saves: what ``lora`` saves, and the gradients of A.
Sends: down, the pairs of all tasks in each round. Up, B of one pair, and for ``dual-gpm`` a Gram matrix of each layer's
inputs in the first and last round of a task: layers with wide inputs cost most, so the default is keys and values.
Use when: tasks of a stream share their inputs' main directions and nothing of earlier tasks may be stored. Unlike
``o-lora``, no weight of a loss term has to be searched.
Avoid when: earlier tasks fill the inputs' space, so that little is left for A.
Source: Liang, Li, "InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning" (arXiv 2404.00228), equations
6 to 8 and algorithm 1, with the code's scale of 1 / sqrt(3). Averaging B alone: Sun et al. (FFA-LoRA, arXiv
2403.12313).
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from fedtune.tasks import Task
from fedtune.techniques.low_rank._low_rank import list_lora_layers
from fedtune.techniques.low_rank._task_pairs import CONFLICTS, TaskPairTechnique, get_pair_name

__all__ = ["InfLora"]


class InfLora(TaskPairTechnique):
    """A pair for each task, with a fixed A off the inputs of earlier tasks."""

    name: ClassVar[str] = "inf-lora"
    fits_plain_blocks: ClassVar[bool] = True
    paged_base_problem: ClassVar[str | None] = None
    trained_factors: ClassVar[str] = "b-only"  # type: ignore[misc]
    allows_kv_cache: ClassVar[bool] = True
    needed_memory: ClassVar[str | None] = "dual-gpm"
    conflicts_with: ClassVar[Mapping[str, str]] = {**CONFLICTS, "o-lora": "both add a low-rank pair for each task"}

    rank: int = Field(8, ge=2)
    target_modules: Literal["all-linear"] | list[str] = Field(
        ["key", "value", "k_proj", "v_proj", "k_lin", "v_lin"], description="or endings of layer names"
    )

    def rewrite_model(self, model: nn.Module, task: Task, seed: int) -> None:
        """Attach the pairs; the rows of A that are designed later are zero until then."""
        super().rewrite_model(model, task, seed)
        with torch.no_grad():
            for number in range(len(self.list_pair_names())):
                for _, layer in list_lora_layers(model):
                    layer.lora_A[get_pair_name(number)].weight[self.count_random_rows(number) :] = 0

    def count_random_rows(self, task: int) -> int:
        """The rows of a task's A that are random. The others are designed after the task's first round."""
        if not self.visits:
            return self.rank
        rounds = next((rounds for visited, rounds in self.visits if visited == task), 2)
        return self.rank if rounds == 1 else self.rank - self.rank // 2
