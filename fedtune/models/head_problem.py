"""Whether a model's head was trained for the kind of label that a task has."""

from fedtune.errors import ModelError
from fedtune.models.model_task import ModelTask

__all__ = ["check_head_problem"]

_PROBLEMS = {
    "single_label_classification": "one class per example",
    "multi_label_classification": "several labels per example",
    "regression": "a number per example",
    None: "a class per token",
}


def check_head_problem(source: str, made_for: str | None, task: ModelTask) -> None:
    """Raise ModelError for a head of another ``problem_type`` than the task's. None fits every task."""
    if made_for not in (None, task.head_problem):
        raise ModelError(
            f"{source} is made for {_PROBLEMS[made_for]}, but {task.name} trains {_PROBLEMS[task.head_problem]}; "
            "choose another model, or take problem_type, id2label and label2id out of its config.json to give it a new "
            "head"
        )
