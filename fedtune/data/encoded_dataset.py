"""What training asks of examples that are tensors already."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["EncodedDataset"]


class EncodedDataset(Protocol):
    """Examples ready to be batched."""

    @property
    def domains(self) -> list[str] | None:
        """The domain of each example, where the data has any."""

    @property
    def lengths(self) -> Tensor | None:
        """Tokens of each example, where they differ."""

    def __len__(self) -> int: ...

    def make_batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The model's inputs for some examples, ``labels`` among them."""
