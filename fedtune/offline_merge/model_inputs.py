"""Build the merge steps of a configuration, and the inputs they read: deltas to the base, or whole models."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fedtune.errors import RecipeError
from fedtune.merging import (
    AlignStep,
    MergeContext,
    MergeInput,
    RelaxStep,
    RenormaliseStep,
    RowReader,
    StatisticsFile,
    build_pipeline,
)
from fedtune.offline_merge.merge_config import MergeConfig
from fedtune.offline_merge.merge_methods import MergeMethod, build_merge_method
from fedtune.offline_merge.model_set import ModelSet
from fedtune.offline_merge.output_plan import OutputTensor, TensorSource
from fedtune.offline_merge.readers.model_reader import ModelReader
from fedtune.recipe.schema import Unit

__all__ = [
    "BaseReader",
    "DeltaReader",
    "EndpointStateDict",
    "OfflineSteps",
    "align_inputs",
    "build_model_inputs",
    "build_steps",
]


class OfflineSteps(NamedTuple):
    """The steps other than the combining one, which is built for each tensor."""

    align: tuple[AlignStep, ...]
    combine: MergeMethod
    relax: tuple[RelaxStep, ...]
    renormalise: tuple[RenormaliseStep, ...]
    needs: frozenset[str]
    """What the merge context must contain."""


def build_steps(config: MergeConfig) -> OfflineSteps:
    """Build the steps of a configuration; RecipeError for a step of the wrong kind."""
    for what, step in {"align": config.align, "renormalise": config.renormalise}.items():
        if step and config.slices is not None:
            raise RecipeError(f"{what} needs whole models; give models in place of slices, or leave {what} out")
    chosen = build_pipeline([*config.align, Unit(name="mean"), *config.relax, *config.renormalise])
    if chosen.server_optimiser is not None:
        raise RecipeError(
            f"relax: {chosen.server_optimiser.name} acts over the rounds of a run, and this is a single merge; leave "
            "it out, and scale the result with a weight or with lambda"
        )
    return OfflineSteps(
        chosen.align, build_merge_method(config.merge_method), chosen.relax, chosen.renormalise, chosen.needs
    )


class BaseReader:
    """The base's rows under the names of the result. The last rows are cached, because several deltas need them."""

    def __init__(self, weights: ModelReader, tensors: Mapping[str, str]) -> None:
        self._weights, self._tensors = weights, tensors
        self._kept: tuple[tuple[str, int, int], Tensor] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows in fp32."""
        asked = (name, start, stop)
        if self._kept is None or self._kept[0] != asked:
            self._kept = (asked, self._weights.rows(self._tensors[name], start, stop))
        return self._kept[1]


class DeltaReader:
    """The difference of a model's rows to the base. If the base lacks the tensor, the rows themselves."""

    def __init__(self, weights: ModelReader, tensors: Mapping[str, str], base: BaseReader | None) -> None:
        self._weights, self._tensors, self._base = weights, tensors, base

    def __call__(self, name: str, start: int, stop: int) -> Tensor:
        """Rows in fp32."""
        rows = self._weights.rows(self._tensors[name], start, stop)
        if self._base is None or name not in self._base:
            return rows
        return rows - self._base.rows(name, start, stop)


class Nothing:
    """Zeros in place of a model of which nothing is kept."""

    def __init__(self, rows: RowReader) -> None:
        self._rows = rows

    def __call__(self, name: str, start: int, stop: int) -> Tensor:
        """Zeros."""
        return torch.zeros_like(self._rows(name, start, stop))


class Renamed:
    """Statistics of a model, under the names of the result."""

    def __init__(self, measured: StatisticsFile, tensors: Mapping[str, str]) -> None:
        self._measured, self._tensors = measured, tensors

    def __contains__(self, name: object) -> bool:
        return self._tensors.get(str(name)) in self._measured

    def __call__(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of what belongs to the model's own tensor."""
        return self._measured(self._tensors[name], start, stop)


class EndpointStateDict(Mapping[str, Tensor]):
    """One model's whole tensors under the result's names, read on demand: the base plus its delta."""

    def __init__(self, targets: Sequence[OutputTensor], base: BaseReader | None, delta: MergeInput | None) -> None:
        self._targets = {target.name: target for target in targets if not target.is_copied}
        self._base, self._delta = base, delta

    def __getitem__(self, name: str) -> Tensor:
        form = self._targets[name].form
        found = torch.zeros(form.shape)
        if self._base is not None and name in self._base:
            found += self._base.rows(name, 0, form.num_rows).reshape(form.shape)
        if self._delta is not None:
            found += self._delta.read_rows(name, 0, form.num_rows).reshape(form.shape)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)


def build_model_inputs(
    chosen: OfflineSteps, targets: Sequence[OutputTensor], models: ModelSet, base: BaseReader | None
) -> dict[str, list[MergeInput]]:
    """Return the models' inputs for each tensor, with their weights and fields of the step."""
    files: dict[str, StatisticsFile] = {}
    readers: dict[tuple[int, str], tuple[DeltaReader, Renamed | None]] = {}
    found: dict[str, list[MergeInput]] = {}
    tensors = _tensors(targets)
    for target in (target for target in targets if not target.is_copied):
        found[target.name] = []
        for place, part in enumerate(target.parts):
            key = (place, part.entry.model)
            if key not in readers:
                rows = DeltaReader(models.by_name[part.entry.model], tensors[key], base)
                readers[key] = (rows, _measured(part.entry.statistics, files, tensors[key]))
            found[target.name].append(_operand(chosen.combine, target, part, *readers[key]))
    return found


def _measured(path: str | None, files: dict[str, StatisticsFile], tensors: Mapping[str, str]) -> Renamed | None:
    """Return a model's statistics. Each file is opened once."""
    if path is None:
        return None
    if path not in files:
        files[path] = StatisticsFile(Path(path))
    return Renamed(files[path], tensors)


def _tensors(targets: Sequence[OutputTensor]) -> dict[tuple[int, str], dict[str, str]]:
    """Map the result's names to a model's tensors, for each input and model."""
    found: dict[tuple[int, str], dict[str, str]] = {}
    for target in targets:
        for place, part in enumerate(target.parts):
            found.setdefault((place, part.entry.model), {})[target.name] = part.tensor
    return found


def _operand(
    chosen: MergeMethod, target: OutputTensor, part: TensorSource, rows: DeltaReader, statistics: Renamed | None
) -> MergeInput:
    """Build one input. Filters are matched with the tensor's name in the model, as in mergekit."""
    own = chosen.bind_model((part.entry.parameters, *target.layers), part.tensor, target.depth)
    return MergeInput(Nothing(rows) if own.nothing else rows, own.weight, own.overrides, statistics)


def align_inputs(
    chosen: OfflineSteps,
    targets: Sequence[OutputTensor],
    found: Mapping[str, Sequence[MergeInput]],
    base: BaseReader | None,
    context: MergeContext,
) -> dict[str, list[MergeInput]]:
    """Return the inputs after the models were aligned. Each model is one input in every tensor."""
    merged = [target for target in targets if not target.is_copied]
    if not chosen.align or not merged:
        return {name: list(parts) for name, parts in found.items()}
    whole = list(found[merged[0].name])
    for step in chosen.align:
        whole = step.align(EndpointStateDict(targets, base, None), whole, context)
    return {
        name: [part._replace(read_rows=one.read_rows) for part, one in zip(parts, whole, strict=True)]
        for name, parts in found.items()
    }
