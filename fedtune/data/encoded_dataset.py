"""The interface of a data set that is encoded as tensors."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["EncodedDataset"]


class EncodedDataset(Protocol):
    """Encoded examples that can be batched."""

    @property
    def domains(self) -> list[str] | None:
        """The domain of each example, or None."""

    @property
    def lengths(self) -> Tensor | None:
        """The number of tokens [n] of each example, or None if all have the same shape."""

    def __len__(self) -> int: ...

    def make_batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the model's inputs and the ``labels`` of the given examples."""
