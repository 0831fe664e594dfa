"""What a client's batches are made of in a round: its examples, changed at random or not, or rows of packed texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedtune.data import EncodedDataset
from fedtune.data.augmentation import AugmentedPictures
from fedtune.data.packed_texts import PackedTexts, pack_texts
from fedtune.data.pixels import EncodedPictures
from fedtune.recipe.augmentation_settings import Augmentation
from fedtune.recipe.schema import Train

__all__ = ["TrainingRows", "make_training_rows"]


@dataclass(frozen=True)
class TrainingRows:
    """The places ``rows`` of ``examples`` are batched; epochs and steps count them."""

    examples: EncodedDataset
    rows: NDArray[np.int64]
    augmentation: Augmentation | None = None
    seed: int = 0
    """That of the random changes."""
    weigh_by: Literal["examples", "tokens"] | None = None

    def at_step(self, step: int) -> EncodedDataset:
        """The examples as one step sees them."""
        if self.augmentation is None:
            return self.examples
        assert isinstance(self.examples, EncodedPictures), "only tasks with images accept augmentation"
        return AugmentedPictures(self.examples, self.augmentation, self.seed, step)

    def count_weight(self, chosen: Sequence[int]) -> int:
        """The examples in some rows, or their targets as ``train.weigh_by`` says: the client's weight in a merge."""
        if not isinstance(self.examples, PackedTexts):
            return len(chosen)
        count = self.examples.count_targets if self.weigh_by == "tokens" else self.examples.count_texts
        return count(chosen)


def make_training_rows(
    examples: EncodedDataset, rows: NDArray[np.int64], settings: Train, derive_seed: Callable[[str], int]
) -> TrainingRows:
    """The client's examples as they are, changed by ``train.augmentation``, or packed as ``train.packing`` says."""
    if settings.augmentation is not None:
        return TrainingRows(examples, rows, settings.augmentation, derive_seed("augmentation"))
    if settings.packing == "none":
        return TrainingRows(examples, rows)
    packed = pack_texts(examples, rows, settings.max_length, derive_seed("packing"))
    return TrainingRows(packed, np.arange(len(packed)), weigh_by=settings.weigh_by)
