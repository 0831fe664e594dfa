"""What classifiers of texts and of images share: a new head, and labels of one of several kinds."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fedtune.tasks._label_problems import LABEL_PROBLEMS, LabelProblem
from fedtune.tasks._scores import ExampleScore, ScoreSums
from fedtune.tasks._task import Task

__all__ = ["Classification"]


class Classification(Task):
    """A task whose labels have a ``problem_type``, which is one of the task's settings."""

    @property
    def problem(self) -> LabelProblem:
        """What the task predicts."""
        assert self.head_problem is not None
        return LABEL_PROBLEMS[self.head_problem]

    @property
    def has_new_head(self) -> bool:
        """Return True."""
        return True

    @property
    def has_accuracy(self) -> bool:
        """Whether a prediction can be correct: a number is only near or far."""
        return self.problem.has_accuracy

    @property
    def main_metric(self) -> str:
        """The usual metric of the problem."""
        return self.problem.main_metric

    @property
    def keeps_outputs(self) -> bool:
        """Whether metrics are no sums over examples."""
        return self.problem.keeps_outputs

    def make_head_settings(self, labels: Sequence[str]) -> dict[str, Any]:
        """One output for each class, or one for a number."""
        if self.head_problem == "regression":
            return {"num_labels": 1, "problem_type": self.head_problem}
        return super().make_head_settings(labels)

    def compute_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The mean loss over the examples of a batch."""
        return self.problem.compute_loss(model, batch)

    def score_logits(self, logits: Tensor, labels: Tensor) -> list[ExampleScore]:
        """A score for each example; logits [n, classes], or [n, 1] for numbers."""
        return self.problem.score_logits(logits, labels)

    def compute_metrics(self, sums: ScoreSums) -> dict[str, float]:
        """The metrics of the problem, then accuracy and loss."""
        return {**self.problem.compute_metrics(sums), **self.compute_basic_metrics(sums)}
