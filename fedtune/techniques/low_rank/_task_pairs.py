"""The base class of O-LoRA and InfLoRA: each task of a stream has its own low-rank pair, and the others stay fixed.

All pairs exist from the start, with B zero, so that the shapes of the shared state never change. The weight of a layer
is W + sum_t (alpha / rank) B_t A_t. A task that comes again trains its own pair again.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import ClassVar, NamedTuple

from pydantic import Field
from torch import nn

from fedtune.errors import RecipeError
from fedtune.techniques.low_rank._low_rank import LowRankTechnique, list_factors

__all__ = ["CONFLICTS", "TaskPairTechnique", "Visit", "get_pair_name"]


CONFLICTS: Mapping[str, str] = {
    "head-only": "the head is already trained with the low-rank pairs",
    "full": "full trains the weights that low-rank pairs leave frozen",
    "lora": "both add a low-rank pair to the same layers",
    "qlora": "both add a low-rank pair to the same layers",
    "dynamic-pruning": "a mask needs trained weights, and low-rank pairs leave them frozen",
    "last-blocks": "low-rank pairs hide the convolutions that identify blocks",
    "tinytl": "low-rank pairs hide the convolutions that identify blocks",
    "mobiletl": "its frozen part has no gradients",
}
"""What no technique with a pair for each task can be combined with, and why."""


class Visit(NamedTuple):
    """A round in the stream: its task, the round within the visit from 1, and the tasks of visits so far."""

    task: int
    round: int
    seen: tuple[int, ...]


class TaskPairTechnique(LowRankTechnique):
    """A low-rank pair for each task."""

    trained_factors: ClassVar[str]  # type: ignore[misc]

    visits: list[tuple[int, int]] = Field([], description="task and rounds of each visit; filled in from the stream")

    def follow_stream(self, visits: Sequence[tuple[int, int]], *, together: bool) -> "TaskPairTechnique":
        """The technique with a pair for each task; RecipeError if clients are in different tasks."""
        if not together:
            raise RecipeError(
                f"train.techniques: {self.name} trains one pair in a round, but clients are in different tasks; set "
                "stream.arrival: together"
            )
        return self.model_copy(update={"visits": list(visits)})

    def list_pair_names(self) -> list[str]:
        """A pair for each task; one without a stream."""
        return [get_pair_name(task) for task in range(1 + max((task for task, _ in self.visits), default=0))]

    def find_visit(self, round_number: int) -> Visit:
        """Return where a round is in the stream. Rounds after its end belong to the last visit."""
        visits = self.visits or [(0, round_number)]
        ends = list(accumulate(rounds for _, rounds in visits))
        number = next((number for number, end in enumerate(ends) if round_number <= end), len(ends) - 1)
        task, rounds = visits[number]
        seen = dict.fromkeys(task for task, _ in visits[: number + 1])
        return Visit(task, round_number - (ends[number] - rounds), tuple(seen))

    def find_trained_factor(self, visit: Visit) -> str:
        """The factor that a round trains, A or B."""
        return "B"

    def begin_round(self, model: nn.Module, round_number: int) -> None:
        """Train one factor of the present task's pair."""
        visit = self.find_visit(round_number)
        trained = f".lora_{self.find_trained_factor(visit)}.{get_pair_name(visit.task)}."
        for name in [*list_factors(model, "A"), *list_factors(model, "B")]:
            model.get_parameter(name).requires_grad_(trained in name)

    def list_server_held_tensors(self, model: nn.Module) -> list[str]:
        """All pairs: those of other tasks are not trained, but every client needs them."""
        return [*list_factors(model, "A"), *list_factors(model, "B")]

    def changes_per_round(self) -> bool:
        """Each task trains other tensors."""
        return True


def get_pair_name(task: int) -> str:
    """Return the name of a task's pair in the model."""
    return f"task{task + 1}"
