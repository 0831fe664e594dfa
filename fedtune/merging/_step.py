"""The shape of merge steps: frozen settings with one behaviour each, all of them on deltas to a common base."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from fedtune.registry import Named

__all__ = ["Activity", "Align", "Combine", "Evidence", "Operand", "Relax", "Renormalise", "Rows", "Shape"]

Shape = tuple[int, ...]
Tensors = Mapping[str, Tensor]


class Rows(Protocol):
    """Reads rows ``start`` to ``stop`` of a named tensor's delta, fp32; one without dimensions is one row."""

    def __call__(self, name: str, start: int, stop: int) -> Tensor:
        """The rows [stop - start, ...]."""
        ...


class Operand(NamedTuple):
    """One model's part in a merge: its delta, its weight, and knobs of its own that go before the step's."""

    rows: Rows
    weight: float
    knobs: Mapping[str, float] = {}


class Activity(NamedTuple):
    """How active the input channels of the layer that owns a weight are; ``axis`` of the weight counts them."""

    mean_abs: Tensor
    axis: int = 1


class Evidence(NamedTuple):
    """What was measured on data, by whoever runs the merge; steps say in ``needs`` what they cannot do without.

    ``activity`` is by tensor name and of the base. ``model`` is the architecture, whose weights steps may overwrite;
    ``batches`` are inputs to it.
    """

    activity: Mapping[str, Activity] = {}
    model: nn.Module | None = None
    batches: Sequence[Tensors] = ()


class Align(Named, ABC):
    """Permutes units of models so that they correspond; functions stay what they were."""

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def align(self, base: Tensors, operands: Sequence[Operand], evidence: Evidence) -> list[Operand]:
        """The operands with their deltas taken after the permutation, in the same order."""


class Combine(Named, ABC):
    """Makes one delta out of those of several models."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def weights(self, examples: Sequence[int]) -> list[float]:
        """One weight per client of a federated round, in client order: shares of the examples unless a step differs."""
        return [count / sum(examples) for count in examples]

    @abstractmethod
    def combine(self, name: str, shape: Shape, operands: Sequence[Operand]) -> Iterator[Tensor]:
        """The merged delta of one tensor, fp32, piece by piece as ``pieces(shape)`` cuts it."""


class Relax(Named, ABC):
    """Scales a merged delta, entry by entry."""

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def relax(self, name: str, start: int, delta: Tensor, evidence: Evidence) -> Tensor:
        """The rows of a merged delta that begin with row ``start``, relaxed."""


class Renormalise(Named, ABC):
    """Mends the activations of a merged model by statistics of those it was made of; folded into the weights."""

    needs: ClassVar[frozenset[str]] = frozenset({"model", "batches"})

    @abstractmethod
    def renormalise(
        self, merged: Tensors, ends: Sequence[tuple[float, Tensors]], evidence: Evidence
    ) -> dict[str, Tensor]:
        """The tensors that change; ``ends`` are the weights (they sum to one) and states of the aligned models."""
