"""The shape of a merge step: frozen settings with one of four behaviours."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

from torch import Tensor

from fedtune.registry import Named

__all__ = ["Combine"]


class Combine(Named, ABC):
    """A way to make one delta out of those of several clients."""

    name: ClassVar[str]

    @abstractmethod
    def weights(self, examples: Sequence[int]) -> list[float]:
        """One weight per contribution, in client order; they sum to one."""

    @abstractmethod
    def combine(self, weights: Sequence[float], deltas: Iterable[Tensor]) -> Tensor:
        """The merged piece of one tensor; ``deltas`` come in client order, one at a time, all of one shape."""
