"""Samples rows of an encoded data set and yields their inputs in batches."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedtune.data.encoded_dataset import EncodedDataset

__all__ = ["iter_inputs", "sample_rows"]


def sample_rows(indices: NDArray[np.int64], count: int | None, seed: int) -> list[int]:
    """Return up to ``count`` of the indices, drawn with the seed, in ascending order. None takes all."""
    if count is None or count >= len(indices):
        return sorted(indices.tolist())
    return sorted(np.random.default_rng(seed).choice(indices, count, replace=False).tolist())


def iter_inputs(examples: EncodedDataset, rows: Sequence[int], batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Yield the model's inputs for the chosen examples in batches, without labels."""
    for start in range(0, len(rows), batch_size):
        made = examples.make_batch(rows[start : start + batch_size])
        yield {name: tensor for name, tensor in made.items() if name != "labels"}
