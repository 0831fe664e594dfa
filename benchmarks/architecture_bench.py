"""One architecture on the bench: its folder, its examples, and recipes for it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL import Image as Picture

from benchmarks.architecture_settings import PIXELS
from benchmarks.architecture_zoo import LABELS, text, write
from fedtune import data, tasks
from fedtune.data import EncodedDataset
from fedtune.data.loaded import as_table
from fedtune.recipe.schema import Recipe
from fedtune.recipe.yaml_file import parse_recipe
from fedtune.tasks import Task

__all__ = ["Bench", "recipe_for"]

_RECIPE = """
version: 2
name: architectures
task: {task}
model: {{source: "path:{folder}"}}
data: {{source: "sample:nothing"}}
devices: [{{count: 1}}]
train: {{lr: 0.01, batch_size: 4, max_length: 16, image_size: {pixels}, local_steps: 2}}
federation: {{rounds: 2}}
"""


@dataclass(frozen=True)
class Bench:
    """An architecture's folder, and its examples as a run encodes them."""

    name: str
    task: Task
    folder: Path
    examples: EncodedDataset

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names, if any."""
        return LABELS if self.task.has_classes else ()

    @classmethod
    def of(cls, name: str, folder: Path) -> "Bench":
        """Save the model and encode eight examples."""
        task = write(name, folder)
        recipe = recipe_for(task, folder)
        return cls(name, task, folder, tasks.encode_examples(_examples(task), recipe, tasks.load_reader(recipe)))


def recipe_for(task: Task, folder: Path, *overrides: str) -> Recipe:
    return parse_recipe(_RECIPE.format(task=task.name, folder=folder, pixels=PIXELS), "architectures", overrides)


def _examples(task: Task) -> data.Table:
    if task.reads_text:
        columns: dict[str, Any] = {"text": [text(row) for row in range(8)]}
        labelled = {"label": [row % len(LABELS) for row in range(8)]} if task.has_classes else {}
        return as_table(Dataset.from_dict(columns | labelled))
    random = np.random.default_rng(0)
    pictures = [Picture.fromarray(random.integers(0, 256, (PIXELS, PIXELS, 3), np.uint8)) for _ in range(8)]
    columns = {"image": pictures, "label": [row % len(LABELS) for row in range(8)]}
    return as_table(Dataset.from_dict(columns, features=Features({"image": Image(), "label": Value("int64")})))
