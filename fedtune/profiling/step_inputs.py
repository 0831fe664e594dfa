"""The inputs of the measured step: the first examples of a recipe, or random inputs without data."""

import torch
from torch import Tensor, nn

from fedtune import data, tasks
from fedtune.errors import DataError
from fedtune.recipe.schema import Recipe
from fedtune.seeds import derive_seed

__all__ = ["encode_first_batch", "make_random_batch"]


def encode_first_batch(recipe: Recipe, corpus: data.DataSplits) -> dict[str, Tensor]:
    """Encode the first ``train.batch_size`` training examples. Texts are padded to ``train.max_length``."""
    size = recipe.train.batch_size
    if len(corpus.train) < size:
        raise DataError(f"the train split has {len(corpus.train)} examples, fewer than a batch; lower train.batch_size")
    task = tasks.get_task(recipe.task)
    reader = task.load_reader(recipe)
    batch = task.encode_examples(corpus.train.select(range(size)), recipe, reader).make_batch(range(size))
    return task.pad_batch(batch, recipe, reader)


def make_random_batch(model: nn.Module, recipe: Recipe, num_labels: int) -> dict[str, Tensor]:
    """Draw inputs of the largest size that the recipe allows, and labels, from the recipe's seed."""
    generator = torch.Generator().manual_seed(derive_seed(recipe.seed, "profile"))
    return tasks.get_task(recipe.task).make_random_batch(model, recipe, num_labels, generator)
