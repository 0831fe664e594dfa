"""What a client's batches are made of in a round: its examples, or rows of packed texts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedtune.data import EncodedDataset
from fedtune.data.packed_texts import PackedTexts, pack_texts
from fedtune.recipe.schema import Train

__all__ = ["TrainingRows", "make_training_rows"]


@dataclass(frozen=True)
class TrainingRows:
    """The places ``rows`` of ``examples`` are batched; epochs and steps count them."""

    examples: EncodedDataset
    rows: NDArray[np.int64]

    def count_examples(self, chosen: Sequence[int]) -> int:
        """The client's examples in some rows, which weigh it in a merge."""
        return self.examples.count_texts(chosen) if isinstance(self.examples, PackedTexts) else len(chosen)


def make_training_rows(examples: EncodedDataset, rows: NDArray[np.int64], settings: Train, seed: int) -> TrainingRows:
    """The client's examples as they are, or packed as ``train.packing`` says."""
    if settings.packing == "none":
        return TrainingRows(examples, rows)
    packed = pack_texts(examples, rows, settings.max_length, seed)
    return TrainingRows(packed, np.arange(len(packed)))
