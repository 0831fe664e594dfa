"""Inputs to measure a model on: examples in batches, or for language models text in whole blocks."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtune import data, models
from fedtune.data import EncodedDataset
from fedtune.errors import DataError
from fedtune.recipe.schema import DataSettings, DeviceClass, Federation, ModelSettings, Recipe, TaskName, Train

__all__ = ["iter_inputs", "iter_token_blocks", "load_calibration_inputs", "sample_rows"]

Batch = dict[str, Tensor]
_SEED, _DOCUMENTS, _BLOCK = 42, 256, 512


def sample_rows(indices: NDArray[np.int64], count: int | None, seed: int) -> list[int]:
    """Up to ``count`` of the indices, drawn by the seed, in ascending order; null takes all."""
    if count is None or count >= len(indices):
        return sorted(indices.tolist())
    return sorted(np.random.default_rng(seed).choice(indices, count, replace=False).tolist())


def iter_inputs(examples: EncodedDataset, chosen: Sequence[int], batch_size: int) -> Iterator[Batch]:
    """Chosen examples as a model reads them, without labels."""
    for start in range(0, len(chosen), batch_size):
        made = examples.make_batch(chosen[start : start + batch_size])
        yield {name: tensor for name, tensor in made.items() if name != "labels"}


def load_calibration_inputs(
    source: str, model: ModelSettings, task: TaskName, *, column: str | None = None, block: int = _BLOCK, batch: int = 8
) -> list[Batch]:
    """Inputs from any data source for a merge that is not part of a run.

    For a language model, as AIM's authors do it: 256 texts of at most ``block`` tokens, end to end, in whole blocks.
    For classifiers 256 examples, texts cut to ``block`` tokens. ``column`` names the text or image column.
    """
    kind = "image" if task == "image-classification" else "text"
    chosen = DataSettings.model_validate({"source": source, "columns": {kind: column or kind}})
    if task == "text-generation":
        documents = data.load_all_examples(_make_minimal_recipe(chosen, model, task), ())["text"]
        return list(iter_token_blocks(_rows(documents, model), block_size=block, batch=batch))
    examples = _encode_unlabelled(chosen, model, task, block)
    return list(iter_inputs(examples, sample_rows(np.arange(len(examples)), _DOCUMENTS, _SEED), batch))


def iter_token_blocks(
    rows: Iterable[Sequence[int]], *, block_size: int = _BLOCK, num_documents: int = _DOCUMENTS, batch: int = 8
) -> Iterator[Batch]:
    """Token ids [k, block] of texts end to end: the first ``num_documents`` not empty, at most a block long.

    What is left over is dropped; DataError when there is not a single block.
    """
    taken: list[int] = []
    count = 0
    for row in rows:
        if count == num_documents:
            break
        if 0 < len(row) <= block_size:
            taken += row
            count += 1
    if len(taken) < block_size:
        raise DataError(
            f"the calibration text gives {len(taken)} tokens, less than a block of {block_size}; bring more"
        )
    whole = torch.tensor(taken[: len(taken) // block_size * block_size]).reshape(-1, block_size)
    for ids in whole.split(batch):
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _rows(documents: Sequence[str], model: ModelSettings) -> Iterator[list[int]]:
    """Token ids of texts in a shuffled order, one text at a time."""
    tokenizer = models.load_tokenizer(model)
    if tokenizer is None:
        raise DataError(f"{model.source} has no tokenizer to read calibration text with; choose another model")
    for index in np.random.default_rng(_SEED).permutation(len(documents)):
        yield tokenizer(documents[int(index)], verbose=False)["input_ids"]


def _encode_unlabelled(chosen: DataSettings, model: ModelSettings, task: TaskName, length: int) -> EncodedDataset:
    """Examples of a source that may have no labels, encoded as a classifier reads them."""
    pictures = task == "image-classification"
    recipe = _make_minimal_recipe(chosen, model, task if pictures else "text-generation")
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_length": length})})
    found = data.load_all_examples(recipe, ())
    labels = data.Values(np.zeros(len(found), np.int64))
    blank = found.select_columns(["image" if pictures else "text"]).with_column("label", labels)
    return data.encode_examples(blank, recipe, models.reader(recipe))


def _make_minimal_recipe(chosen: DataSettings, model: ModelSettings, task: TaskName) -> Recipe:
    """The least recipe that reads a source."""
    return Recipe(
        name="calibration",
        task=task,
        model=model,
        data=chosen,
        devices=[DeviceClass(count=1)],
        train=Train(local_steps=1),
        federation=Federation(rounds=1),
    )
