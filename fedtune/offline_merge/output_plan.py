"""The plan of a merge: every tensor of the result, and the tensors of the models that it is merged from."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from fedtune.errors import ModelError, RecipeError
from fedtune.offline_merge.layer_names import LayerTensorName, compute_relative_depths, parse_layer_name, stacks
from fedtune.offline_merge.layered_parameters import ParameterLayer, over_depth
from fedtune.offline_merge.merge_config import MergeConfig, ModelEntry, OutputSlice, SliceSource
from fedtune.offline_merge.merge_methods import MergeMethod, build_merge_method
from fedtune.offline_merge.model_config import apply_slices
from fedtune.offline_merge.model_set import ModelSet, read_model_config
from fedtune.offline_merge.readers.model_reader import ModelReader
from fedtune.offline_merge.safetensors_layout import TensorInfo

__all__ = [
    "OutputTensor",
    "TensorSource",
    "check_parameters",
    "empty_slices",
    "gradients_outside",
    "plan_output_tensors",
]


class TensorSource(NamedTuple):
    """One model's tensor in a merge, and the model's own parameters."""

    entry: ModelEntry
    tensor: str


class OutputTensor(NamedTuple):
    """One tensor of the result. Deltas are to ``base_tensor``; with ``is_copied`` it is copied from there.

    ``layers`` are the parameters for all inputs, the most specific first. ``averaged``: some models lack the tensor,
    and the others are averaged.
    """

    name: str
    form: TensorInfo
    parts: tuple[TensorSource, ...]
    base_tensor: str | None
    is_copied: bool
    layers: tuple[ParameterLayer, ...]
    depth: float
    averaged: bool = False


def plan_output_tensors(config: MergeConfig, models: ModelSet) -> list[OutputTensor]:
    """Return the tensors of the result in order; RecipeError or ModelError if the configuration does not fit."""
    chosen = build_merge_method(config.merge_method)
    if chosen.operates_on == "deltas" and config.base_model is None:
        raise RecipeError(
            f"{chosen.name} merges what models differ from a base; name it with base_model or --base-model"
        )
    check_parameters(config, chosen)
    targets = list(_whole(config, models, chosen) if config.models is not None else _sliced(config, models, chosen))
    if chosen.is_passthrough and any(len(target.parts) != 1 for target in targets if not target.is_copied):
        raise RecipeError("passthrough copies one model per slice; name one source in each, or choose linear")
    return targets


def gradients_outside(config: MergeConfig, targets: Sequence[OutputTensor]) -> list[str]:
    """Whether values over the depth apply to tensors behind the layers, for which mergekit uses the first value."""
    layers = [config.parameters, *(entry.parameters for entry in config.model_entries)]
    layers += [part.parameters for part in config.slices or []]
    if not any(over_depth(setting) for layer in layers for setting in layer.values()):
        return []
    known = set(stacks(target.name for target in targets))
    outside = [target for target in targets if (at := parse_layer_name(target.name)) is None or at.before not in known]
    behind = [target.name for target in outside if target.depth == 1]
    told = ", ".join(behind[:3]) + (" ..." if len(behind) > 3 else "")
    if not behind:
        return []
    return [f"of values over the depth, {told} take the last, as behind all layers; mergekit gives them the first"]


def empty_slices(config: MergeConfig) -> list[str]:
    """Whether a slice contains no layer, for example because its end was taken for its last layer."""
    firsts = [part.sources[0] for part in config.slices or []]
    empty = [(one.layer_range[0], one.model) for one in firsts if one.layer_range[0] == one.layer_range[1]]
    return [
        f"layer_range [{at}, {at}] of {model} holds no layer, as its end is not counted; [{at}, {at + 1}] is layer {at}"
        for at, model in empty
    ]


def check_parameters(config: MergeConfig, chosen: MergeMethod) -> None:
    """Raise RecipeError for an unknown parameter of the merge, a slice or a model."""
    chosen.check_parameters(config.parameters, "parameters")
    for part in config.slices or []:
        chosen.check_parameters(part.parameters, "a slice's parameters")
    for entry in config.model_entries:
        chosen.check_parameters(entry.parameters, f"the parameters of {entry.model}", own=True)


def _whole(config: MergeConfig, models: ModelSet, chosen: MergeMethod) -> Iterator[OutputTensor]:
    entries = _list_merged_entries(config.models or [], config, chosen)
    if config.base_model is not None and _base_counts(config, chosen, entries):
        entries = [ModelEntry(model=config.base_model), *entries]
    forms = next(iter(models.fine_tuned.values()), models.first).tensor_infos
    depth = compute_relative_depths(forms)
    for name, form in forms.items():
        parts = tuple(
            TensorSource(entry, name) for entry in entries if name in models.by_name[entry.model].tensor_infos
        )
        target = OutputTensor(name, form, parts, name, False, (config.parameters,), depth[name])
        yield _complete(config, models, target._replace(averaged=len(parts) < len(entries)))


def _base_counts(config: MergeConfig, chosen: MergeMethod, entries: Sequence[ModelEntry]) -> bool:
    """Whether a base that is only named as the base is one of the models, as in mergekit."""
    if config.base_model in [entry.model for entry in entries] or config.relax:
        return False
    if chosen.name == "slerp":
        return len(entries) == 1
    return chosen.name == "karcher" or (chosen.name == "linear" and "weight" in config.parameters)


def _list_merged_entries(entries: Sequence[ModelEntry], config: MergeConfig, chosen: MergeMethod) -> list[ModelEntry]:
    """Return the models to merge: without the base for deltas; with the base first for an interpolation."""
    if chosen.operates_on == "deltas" or (chosen.operates_on == "either" and config.base_model is not None):
        kept = [entry for entry in entries if entry.model != config.base_model]
        if not kept:
            raise RecipeError("only the base is named; name the models that are to be merged into it")
        return kept
    if chosen.name == "slerp":
        return sorted(entries, key=lambda entry: entry.model != config.base_model)
    return list(entries)


def _complete(config: MergeConfig, models: ModelSet, target: OutputTensor) -> OutputTensor:
    """Return the tensor in the requested data type, and without a base if the base lacks it."""
    known = config.base_model is not None and target.base_tensor in models.by_name[config.base_model].tensor_infos
    form = TensorInfo(target.form.shape, _precision(config, target.form.dtype))
    base = target.base_tensor if known else None
    return target._replace(form=form, base_tensor=base, is_copied=not form.dtype.is_floating_point)


def _precision(config: MergeConfig, own: torch.dtype) -> torch.dtype:
    said = config.out_dtype or config.dtype
    return own if said is None or not own.is_floating_point else getattr(torch, said)


def _sliced(config: MergeConfig, models: ModelSet, chosen: MergeMethod) -> Iterator[OutputTensor]:
    """Return the result's tensors: before the layers from the first slice's models, after them from the last one's."""
    slices = config.slices or []
    first = models.by_name[slices[0].sources[0].model]
    forms, before = first.tensor_infos, _stack(first)
    apply_slices(read_model_config(first), slices, models)  # for what it refuses
    outside = {
        name: depth for name, depth in compute_relative_depths(forms).items() if _parse_in_stack(name, before) is None
    }
    for name in (name for name, depth in outside.items() if depth == 0):
        yield _outside(config, models, chosen, slices[0], name, 0.0)
    number = 0
    for part in slices:
        count = part.sources[0].layer_range[1] - part.sources[0].layer_range[0]
        for offset in range(count):
            for target in _layer(config, models, chosen, part, _Layer(before, offset, number)):
                yield _complete(config, models, target)
            number += 1
    for name in (name for name, depth in outside.items() if depth > 0):
        yield _outside(config, models, chosen, slices[-1], name, 1.0)


def _stack(model: ModelReader) -> str:
    """Return the prefix of the layers that slices count; ModelError unless there is exactly one stack."""
    found = stacks(model.tensor_infos)
    if not found:
        raise ModelError(f"{model.source} has no numbered layers, so it cannot be cut into slices")
    if len(found) > 1:
        raise ModelError(
            f"{model.source} has several stacks of layers ({', '.join(sorted(found))}), and slices do not say whose "
            "layers they count; give models in place of slices"
        )
    return found[0]


def _outside(
    config: MergeConfig, models: ModelSet, chosen: MergeMethod, part: OutputSlice, name: str, depth: float
) -> OutputTensor:
    parts = tuple(TensorSource(source, name) for source in _list_merged_entries(part.sources, config, chosen))
    form = _form(models, part.sources[0], name)
    _check_parts(models, name, form, parts)
    target = OutputTensor(name, form, parts, name, False, (part.parameters, config.parameters), depth)
    return _complete(config, models, target)


class _Layer(NamedTuple):
    """A layer of the result: its number, its position in its slice, and the prefix of the layers."""

    before: str
    offset: int
    number: int


def _layer(
    config: MergeConfig, models: ModelSet, chosen: MergeMethod, part: OutputSlice, layer: _Layer
) -> Iterator[OutputTensor]:
    first = part.sources[0]
    counted: list[SliceSource] = [
        source for source in _list_merged_entries(part.sources, config, chosen) if isinstance(source, SliceSource)
    ]
    bases = [source for source in part.sources if source.model == config.base_model]
    if chosen.operates_on == "deltas" and not bases:
        raise RecipeError(f"{chosen.name} needs layers of the base; name {config.base_model} in every slice's sources")
    last = first.layer_range[1] - first.layer_range[0] - 1
    depth = layer.offset / last if last else 1.0
    for layered in _tensors(models, first, layer.before, layer.offset):
        name = layered.name_in_layer(layer.number)
        parts = tuple(
            TensorSource(source, layered.name_in_layer(source.layer_range[0] + layer.offset)) for source in counted
        )
        base = layered.name_in_layer((bases or [first])[0].layer_range[0] + layer.offset)
        form = _form(models, first, layered.name_in_layer(first.layer_range[0] + layer.offset))
        _check_parts(models, name, form, parts)
        yield OutputTensor(name, form, parts, base, False, (part.parameters, config.parameters), depth)


def _tensors(models: ModelSet, source: SliceSource, before: str, offset: int) -> list[LayerTensorName]:
    number = source.layer_range[0] + offset
    found = [_parse_in_stack(name, before) for name in models.by_name[source.model].tensor_infos]
    layer = [layered for layered in found if layered is not None and layered.number == number]
    if not layer:
        raise RecipeError(f"layer_range {list(source.layer_range)}: {source.model} has no layer {number}")
    return layer


def _parse_in_stack(name: str, before: str) -> LayerTensorName | None:
    found = parse_layer_name(name)
    return found if found is not None and found.before == before else None


def _form(models: ModelSet, source: SliceSource, name: str) -> TensorInfo:
    return models.by_name[source.model].tensor_infos[name]


def _check_parts(models: ModelSet, name: str, form: TensorInfo, parts: Sequence[TensorSource]) -> None:
    for part in parts:
        found: Mapping[str, TensorInfo] = models.by_name[part.entry.model].tensor_infos
        if part.tensor not in found:
            raise ModelError(f"{part.entry.model} has no tensor {part.tensor}, which {name} is merged from")
        if found[part.tensor].shape != form.shape:
            raise ModelError(
                f"the first tensor that differs is {part.tensor}: {list(found[part.tensor].shape)} in "
                f"{part.entry.model} in place of {list(form.shape)}; take models of one shape"
            )
