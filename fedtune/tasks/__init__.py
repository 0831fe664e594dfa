"""What a model is trained to do: one file is one task. ``get_task`` turns a recipe's name into a task."""

from collections.abc import Sequence
from typing import Any

from fedtune import data
from fedtune.data import DataSplits, EncodedDataset, Table
from fedtune.recipe.schema import Recipe, Unit
from fedtune.recipe.unit_registry import build_unit
from fedtune.tasks._scores import ExampleScore, ScoreSums
from fedtune.tasks._segments import Segment
from fedtune.tasks._task import Task

__all__ = [
    "ExampleScore",
    "ScoreSums",
    "Segment",
    "Task",
    "encode_examples",
    "get_task",
    "load_all_examples",
    "load_class_names",
    "load_data",
    "load_reader",
    "load_trainable_examples",
    "resolve_reader",
]


def get_task(unit: Unit | str) -> Task:
    """The task of that name with its settings; RecipeError for an unknown name or setting."""
    task: Task = build_unit(__name__, Unit(name=unit) if isinstance(unit, str) else unit, "task")
    return task


def load_data(recipe: Recipe, known: Sequence[str] = ()) -> DataSplits:
    """The examples of a recipe in three splits, as ``data.load_data`` reads them for its task."""
    return data.load_data(recipe, get_task(recipe.task).columns, known)


def load_all_examples(recipe: Recipe, labels: Sequence[str], part: str = "all") -> Table:
    """The examples of a recipe's source, of all splits or of one, with the class numbers of ``labels``."""
    return data.load_all_examples(recipe, get_task(recipe.task).columns, labels, part)


def load_trainable_examples(recipe: Recipe, labels: Sequence[str]) -> Table:
    """The examples of a recipe's source that may be trained on, with the class numbers of ``labels``."""
    return data.load_trainable_examples(recipe, get_task(recipe.task).columns, labels)


def load_class_names(recipe: Recipe) -> tuple[str, ...]:
    """The class names of the recipe's model in the order of its head; empty where it has no names."""
    return get_task(recipe.task).load_class_names(recipe.model)


def load_reader(recipe: Recipe) -> Any:
    """What turns the recipe's examples into inputs: a tokenizer or a preprocessor."""
    return get_task(recipe.task).load_reader(recipe)


def resolve_reader(recipe: Recipe) -> Recipe:
    """The recipe with the settings of its reader written out, so that every device reads examples alike."""
    return get_task(recipe.task).resolve_reader(recipe)


def encode_examples(examples: Table, recipe: Recipe, reader: Any) -> EncodedDataset:
    """Examples as tensors; ``reader`` is what ``load_reader`` returned."""
    return get_task(recipe.task).encode_examples(examples, recipe, reader)
