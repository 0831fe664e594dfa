"""Base classes of merge steps, and the values that steps receive. All steps work on deltas to a common base."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple, Protocol, Self

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
    "Reference",
    "RelaxStep",
    "RenormaliseStep",
    "RowReader",
    "ServerOptimiserStep",
    "Shape",
    "StatisticsReader",
]

Shape = tuple[int, ...]
Tensors = Mapping[str, Tensor]
Reference = Literal["last merge", "root data"]
"""Whose delta a step compares models with: that of the last merge, or one that the server trained on root data."""


class RowReader(Protocol):
    """Reads rows ``start`` to ``stop`` of a named tensor's delta, fp32; one without dimensions is one row."""

    def __call__(self, name: str, start: int, stop: int) -> Tensor:
        """The rows [stop - start, ...]."""
        ...


class StatisticsReader(RowReader, Protocol):
    """Reads statistics that were measured on one model's data, by tensor name, like deltas."""

    def __contains__(self, name: object, /) -> bool:
        """Whether the tensor was measured."""
        ...


class MergeInput(NamedTuple):
    """One model in a merge: its delta, its weight, and settings for this model alone, which override the step's."""

    read_rows: RowReader
    weight: float
    overrides: Mapping[str, float] = {}
    statistics: StatisticsReader | None = None


class ActivationStatistics(NamedTuple):
    """The mean activation of a layer's input channels; ``axis`` is the axis of the layer's weight that lists them.

    ``mean_abs`` [channels], or [out, channels of its group] for the rows of a grouped convolution's weight.
    """

    mean_abs: Tensor
    axis: int = 1


class MergeContext(NamedTuple):
    """What steps need besides the merge inputs; ``needs`` of a step names what it cannot do without.

    ``activation_statistics`` are those of the base, by tensor name. ``model`` is the architecture; steps may overwrite
    its weights. ``calibration_batches`` are inputs to the model. ``low_rank_pairs`` are the pairs among the tensors.
    ``round_number`` makes each merge of a run draw its own random masks; it is 0 outside a run. ``moments`` are those
    of a server optimiser after the last merge. ``reference`` is the delta that the combining step names in its
    ``reference``, by tensor name.
    """

    activation_statistics: Mapping[str, ActivationStatistics] = {}
    model: nn.Module | None = None
    calibration_batches: Sequence[Tensors] = ()
    low_rank_pairs: Sequence[LowRankPair] = ()
    round_number: int = 0
    moments: Mapping[str, Tensor] = {}
    reference: Mapping[str, Tensor] = {}


class AlignStep(NamedUnit, ABC):
    """Permutes the units of each model so that they correspond; each model still computes the same function."""

    @property
    def needs(self) -> frozenset[str]:
        """What the context must contain for these settings."""
        return frozenset()

    @abstractmethod
    def align(self, base: Tensors, merge_inputs: Sequence[MergeInput], context: MergeContext) -> list[MergeInput]:
        """The merge inputs with the deltas of the permuted models, in the same order."""


class CombineStep(NamedUnit, ABC):
    """Combines the deltas of several models into one delta. ``min_models`` and ``max_models`` limit their number.

    Set ``sparsifies`` when the step drops or rescales entries; batch-norm running statistics are then averaged instead.
    Set ``selects_entries`` when entries win by sign or size, or directions of a tensor count. Such a step cannot merge
    one LoRA factor alone, because entries and directions of a factor are not those of the product. Set ``averages``
    when the result is exactly the weighted sum of the deltas. Clear ``adds_variance_of_means`` when a merged batch-norm
    variance must not include the spread between the means of the models. Set ``weighs_whole_updates`` when the result
    combines whole deltas, with one coefficient for all entries of a model. Set ``reference`` when the step compares
    models with a delta of the server, which only a round has.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = None
    sparsifies: ClassVar[bool] = False
    selects_entries: ClassVar[bool] = False
    averages: ClassVar[bool] = False
    adds_variance_of_means: ClassVar[bool] = True
    weighs_whole_updates: ClassVar[bool] = False
    reference: ClassVar[Reference | None] = None
    update_kind: ClassVar[UpdateKind] = "tensors"

    @property
    def required_models(self) -> int:
        """The smallest number of models that the step can merge with its settings."""
        return self.min_models

    def compute_client_weights(self, num_examples: Sequence[int]) -> list[float]:
        """One weight per client of a federated round, in client order: shares of the examples unless a step differs."""
        return [count / sum(num_examples) for count in num_examples]

    def bind(
        self, shapes: Mapping[str, Shape], merge_inputs: Sequence[MergeInput], context: MergeContext
    ) -> "BoundCombine":
        """The step and the inputs to use for each tensor, in steps that must read whole models first."""
        return BoundCombine(self, merge_inputs)

    def with_overrides(self, merge_input: MergeInput) -> Self:
        """The settings for one model: its overrides replace the step's."""
        return self.model_copy(update=merge_input.overrides)

    @abstractmethod
    def combine(self, name: str, shape: Shape, merge_inputs: Sequence[MergeInput]) -> Iterator[Tensor]:
        """The merged delta of one tensor, fp32, in the chunks of ``iter_row_chunks(shape)``."""


class BoundCombine(NamedTuple):
    """A combine step and its inputs, after whole models were read where the step needs it."""

    combine: CombineStep
    merge_inputs: Sequence[MergeInput]


class RelaxStep(NamedUnit, ABC):
    """Scales a merged delta, entry by entry."""

    @property
    def needs(self) -> frozenset[str]:
        """What the context must contain for these settings."""
        return frozenset()

    @abstractmethod
    def relax(self, name: str, start: int, delta: Tensor, context: MergeContext) -> Tensor:
        """Return the relaxed rows of a merged delta, of which ``start`` is the first."""


class RenormaliseStep(NamedUnit, ABC):
    """Corrects the activations of a merged model by statistics of the input models, in its weights."""

    needs: ClassVar[frozenset[str]] = frozenset({"model", "batches"})

    @abstractmethod
    def renormalise(
        self, merged: Tensors, ends: Sequence[tuple[float, Tensors]], context: MergeContext
    ) -> dict[str, Tensor]:
        """The tensors that change; ``ends`` are the weights (they sum to one) and states of the aligned models."""


class ServerOptimiserStep(NamedUnit, ABC):
    """Takes the merged change of each tensor as a gradient. The run keeps its moments; devices never receive them."""

    needs: ClassVar[frozenset[str]] = frozenset()

    @property
    @abstractmethod
    def initial_moments(self) -> Mapping[str, float]:
        """The moments of each entry by name, with their values before the first round."""

    @abstractmethod
    def compute_step(self, delta: Tensor, moments: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """Return by how much the state moves, and the next moments, given the merged change. It is pure."""
