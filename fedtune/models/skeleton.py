"""Build the model of a recipe from its configuration alone, to plan a training step. No weight file is opened."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from fedtune.models import image_model_files
from fedtune.models.model_task import ModelTask
from fedtune.models.position_interpolation import refuse_interpolation
from fedtune.models.sources import locate_model
from fedtune.recipe.schema import ModelSettings

__all__ = ["make_skeleton"]


def make_skeleton(
    model: ModelSettings, task: ModelTask, labels: Sequence[str], *, seed: int, quantisation: object | None = None
) -> nn.Module:
    """Return the model that ``load_model`` loads, with drawn weights.

    Build it under FakeTensorMode, where tensors hold no data. ``quantisation`` gives linear layers the storage of NF4.
    """
    location = locate_model(model)
    if image_model_files.is_fedtune_image_model(location):
        refuse_interpolation(model)
        if quantisation is not None:
            image_model_files.refuse_four_bits(model, Path(location))
        return image_model_files.load_image_model(model, Path(location), task, labels, seed=seed, read_weights=False)
    from fedtune.models import pretrained

    made, kept = pretrained.make_pretrained_skeleton(model, location, task, labels)
    if quantisation is not None:
        from fedtune.models.four_bit_skeleton import quantise_skeleton

        quantise_skeleton(made, kept)
    return made
