"""The shape of merge steps: frozen settings with one behaviour each, all of them on deltas to a common base."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol, Self

from torch import Tensor, nn

from fedtune.recipe.unit_registry import NamedUnit
from fedtune.wire.client_update import LowRankPair, UpdateKind

__all__ = [
    "ActivationStatistics",
    "AlignStep",
    "BoundCombine",
    "CombineStep",
    "MergeContext",
    "MergeInput",
    "RelaxStep",
    "RenormaliseStep",
    "RowReader",
    "Shape",
    "StatisticsReader",
]

Shape = tuple[int, ...]
Tensors = Mapping[str, Tensor]


class RowReader(Protocol):
    """Reads rows ``start`` to ``stop`` of a named tensor's delta, fp32; one without dimensions is one row."""

    def __call__(self, name: str, start: int, stop: int) -> Tensor:
        """The rows [stop - start, ...]."""
        ...


class StatisticsReader(RowReader, Protocol):
    """What was measured on one model's data, by tensor name; read like deltas."""

    def __contains__(self, name: object, /) -> bool:
        """Whether the tensor was measured."""
        ...


class MergeInput(NamedTuple):
    """One model's part in a merge: its delta, its weight, and knobs of its own that go before the step's."""

    read_rows: RowReader
    weight: float
    overrides: Mapping[str, float] = {}
    statistics: StatisticsReader | None = None


class ActivationStatistics(NamedTuple):
    """How active the input channels of the layer that owns a weight are; ``axis`` of the weight counts them.

    ``mean_abs`` [channels], or [out, channels of its group] for the rows of a grouped convolution's weight.
    """

    mean_abs: Tensor
    axis: int = 1


class MergeContext(NamedTuple):
    """What was measured on data, by whoever runs the merge; steps say in ``needs`` what they cannot do without.

    ``activity`` is by tensor name and of the base. ``model`` is the architecture, whose weights steps may overwrite;
    ``batches`` are inputs to it. ``draw`` numbers the merges of a run, so that each draws its own random masks.
    ``pairs`` are the low-rank pairs among the tensors.
    """

    activation_statistics: Mapping[str, ActivationStatistics] = {}
    model: nn.Module | None = None
    calibration_batches: Sequence[Tensors] = ()
    low_rank_pairs: Sequence[LowRankPair] = ()
    round_number: int = 0


class AlignStep(NamedUnit, ABC):
    """Permutes units of models so that they correspond; functions stay what they were."""

    @property
    def needs(self) -> frozenset[str]:
        """What must be in the evidence, as the step is set."""
        return frozenset()

    @abstractmethod
    def align(self, base: Tensors, operands: Sequence[MergeInput], evidence: MergeContext) -> list[MergeInput]:
        """The operands with their deltas taken after the permutation, in the same order."""


class CombineStep(NamedUnit, ABC):
    """Makes one delta out of those of several models, ``fewest`` at least and ``most`` at most.

    Running statistics of batch norms are no task vectors: steps that drop or stretch entries are ``thinning`` and leave
    them to the mean. ``pooled`` variances also hold the spread of the models' means, whatever the models. Steps whose
    entries win by sign or size are ``picks``: what they make of B, with A common, is no merge of the products B A.
    Of one that ``averages`` nothing comes but the sum of weight times delta.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = None
    sparsifies: ClassVar[bool] = False
    selects_entries: ClassVar[bool] = False
    averages: ClassVar[bool] = False
    adds_variance_of_means: ClassVar[bool] = True
    update_kind: ClassVar[UpdateKind] = "tensors"

    @property
    def needed(self) -> int:
        """The fewest models that the step, as it is set, can merge."""
        return self.min_models

    def weights(self, examples: Sequence[int]) -> list[float]:
        """One weight per client of a federated round, in client order: shares of the examples unless a step differs."""
        return [count / sum(examples) for count in examples]

    def bind(
        self, shapes: Mapping[str, Shape], operands: Sequence[MergeInput], evidence: MergeContext
    ) -> "BoundCombine":
        """The step and the operands that go through the tensors one by one, when only whole models can tell them."""
        return BoundCombine(self, operands)

    def with_overrides(self, operand: MergeInput) -> Self:
        """The settings that hold for one model: its knobs go before the step's."""
        return self.model_copy(update=operand.overrides)

    @abstractmethod
    def combine(self, name: str, shape: Shape, operands: Sequence[MergeInput]) -> Iterator[Tensor]:
        """The merged delta of one tensor, fp32, piece by piece as ``pieces(shape)`` cuts it."""


class BoundCombine(NamedTuple):
    """A combining step and its operands, after all that had to be said of whole models."""

    combine: CombineStep
    operands: Sequence[MergeInput]


class RelaxStep(NamedUnit, ABC):
    """Scales a merged delta, entry by entry."""

    @property
    def needs(self) -> frozenset[str]:
        """What must be in the evidence, as the step is set."""
        return frozenset()

    @abstractmethod
    def relax(self, name: str, start: int, delta: Tensor, evidence: MergeContext) -> Tensor:
        """The rows of a merged delta that begin with row ``start``, relaxed."""


class RenormaliseStep(NamedUnit, ABC):
    """Mends the activations of a merged model by statistics of those it was made of; folded into the weights."""

    needs: ClassVar[frozenset[str]] = frozenset({"model", "batches"})

    @abstractmethod
    def renormalise(
        self, merged: Tensors, ends: Sequence[tuple[float, Tensors]], evidence: MergeContext
    ) -> dict[str, Tensor]:
        """The tensors that change; ``ends`` are the weights (they sum to one) and states of the aligned models."""
