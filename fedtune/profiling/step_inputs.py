"""The inputs of the measured step: the first examples of a recipe, or random inputs without data."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtune import data, models
from fedtune.errors import DataError, ModelError
from fedtune.recipe.schema import Recipe
from fedtune.seeds import derive_seed

__all__ = ["encode_first_batch", "make_random_batch"]


def encode_first_batch(recipe: Recipe, corpus: data.DataSplits) -> dict[str, Tensor]:
    """Encode the first ``train.batch_size`` training examples. Texts are padded to ``train.max_length``."""
    settings = recipe.train
    if len(corpus.train) < settings.batch_size:
        raise DataError(
            f"the training part has {len(corpus.train)} examples, fewer than a batch; lower train.batch_size"
        )
    first = corpus.train.select(range(settings.batch_size))
    reader = models.reader(recipe)
    batch = data.encode_examples(first, recipe, reader).make_batch(range(settings.batch_size))
    texts = recipe.task != "image-classification"
    return _pad_batch(batch, settings.max_length, int(reader.pad_token_id)) if texts else batch


def _pad_batch(batch: Mapping[str, Tensor], length: int, padding: int) -> dict[str, Tensor]:
    """Pad the rows of tokens on the right. A label per text stays as it is."""
    fill = {"input_ids": padding, "attention_mask": 0, "labels": -100}
    return {
        name: tensor if tensor.dim() == 1 else F.pad(tensor, (0, length - tensor.shape[1]), value=fill[name])
        for name, tensor in batch.items()
    }


def make_random_batch(model: nn.Module, recipe: Recipe, labels: int) -> dict[str, Tensor]:
    """Draw tokens at full length, or pixels, and labels from the recipe's seed."""
    random = torch.Generator().manual_seed(derive_seed(recipe.seed, "profile"))
    settings = recipe.train
    answers = torch.randint(max(labels, 1), (settings.batch_size,), generator=random)
    if recipe.task == "image-classification":
        side = models.reader(recipe).side
        pixels = torch.randn(settings.batch_size, 3, side, side, generator=random)
        return {"pixel_values": pixels, "labels": answers}
    config: Any = model.config
    _check_length(config, settings.max_length)
    ids = torch.randint(config.vocab_size, (settings.batch_size, settings.max_length), generator=random)
    language = recipe.task == "text-generation"
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids if language else answers}


def _check_length(config: Any, length: int) -> None:
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ModelError(f"the model reads at most {longest} tokens; lower train.max_length, which is {length}")
