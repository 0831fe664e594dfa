"""Calibration inputs from any data source, for an offline merge."""

from torch import Tensor

from fedtune import data
from fedtune.recipe.schema import DataSettings, DeviceClass, Federation, ModelSettings, Recipe, Train
from fedtune.tasks import Task

__all__ = ["load_calibration_inputs"]

_BLOCK = 512


def load_calibration_inputs(
    source: str, model: ModelSettings, task: Task, *, column: str | None = None, block: int = _BLOCK, batch: int = 8
) -> list[dict[str, Tensor]]:
    """Return batches of inputs that ``task`` makes from the examples of ``source``. Labels are not needed.

    Texts are truncated to ``block`` tokens. ``column`` is the column that holds the model's input.
    """
    name = task.input_column
    recipe = Recipe(
        name="calibration",
        task=task.name,
        model=model,
        data=DataSettings.model_validate({"source": source, "columns": {name: column or name}}),
        devices=[DeviceClass(count=1)],
        train=Train(local_steps=1, max_length=block),
        federation=Federation(rounds=1),
    )
    examples = data.load_all_examples(recipe, task.columns[:1], ())
    return list(task.iter_calibration_inputs(examples, recipe, batch))
