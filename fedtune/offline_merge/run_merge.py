"""Run a merge: read the models' files, and write the result tensor by tensor and piece by piece."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedtune.errors import ModelError, RecipeError
from fedtune.merging import (
    BoundCombine,
    CombineStep,
    MergeContext,
    MergeInput,
    MergePipeline,
    bind_combine,
    merge_row_chunks,
)
from fedtune.merging.combine.mean import Mean
from fedtune.offline_merge.chat_templates import resolve_chat_template
from fedtune.offline_merge.merge_config import MergeConfig
from fedtune.offline_merge.model_inputs import BaseReader, OfflineSteps, align_inputs, build_model_inputs, build_steps
from fedtune.offline_merge.model_set import ModelSet, open_models
from fedtune.offline_merge.output_folder import MergeOutput
from fedtune.offline_merge.output_plan import OutputTensor, empty_slices, gradients_outside, plan_output_tensors
from fedtune.offline_merge.readers.open_model import RunExporter, refuse_runs
from fedtune.offline_merge.safetensors_layout import TensorInfo, fits, too_large
from fedtune.offline_merge.threads import one_thread
from fedtune.wire.client_update import iter_row_chunks

__all__ = ["PreparedMerge", "ProgressCallback", "plan_merge", "prepare_merge", "shares_of", "write_merged_tensors"]

ProgressCallback = Callable[[int], None]
"""Called with the number of bytes of the result that are written."""


class PreparedMerge(NamedTuple):
    """A merge that is checked as far as possible without reading tensors."""

    config: MergeConfig
    models: ModelSet
    steps: OfflineSteps
    output_tensors: list[OutputTensor]
    base: BaseReader | None

    @property
    def output_bytes(self) -> int:
        """The size of the result's tensors in bytes."""
        return sum(target.form.num_bytes for target in self.output_tensors)

    @property
    def warnings(self) -> list[str]:
        """Warnings about the merge before it is made, one sentence each."""
        return [*self.models.warnings, *empty_slices(self.config), *gradients_outside(self.config, self.output_tensors)]

    @property
    def is_delta_merge(self) -> bool:
        """Whether deltas to the base are combined."""
        acts = self.steps.combine.operates_on
        return acts == "deltas" or (acts == "either" and self.base is not None)

    def plan_shards(self, size: int) -> dict[str, dict[str, TensorInfo]]:
        """Split the result into files of at most ``size`` bytes. A larger tensor has its own file."""
        groups: list[dict[str, TensorInfo]] = [{}]
        filled = 0
        for target in self.output_tensors:
            if groups[-1] and filled + target.form.num_bytes > size:
                groups.append({})
                filled = 0
            groups[-1][target.name] = target.form
            filled += target.form.num_bytes
        if len(groups) == 1:
            return {"model.safetensors": groups[0]}
        return {f"model-{place:05}-of-{len(groups):05}.safetensors": group for place, group in enumerate(groups, 1)}

    def chat_template(self) -> str | None:
        """The Jinja template that the configuration names; RecipeError if it is unknown."""
        wanted = self.config.chat_template
        folders = [model.tokens for model in self.models.by_name.values()]
        return None if wanted is None else resolve_chat_template(wanted, folders)

    def compute_resume_key(self) -> str:
        """Return a hash of the configuration and of the input files' paths, sizes and times."""
        files = [file for model in self.models.by_name.values() for file in model.files]
        told = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        text = json.dumps([self.config.model_dump(mode="json"), told], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def prepare_merge(config: MergeConfig, runs: RunExporter = refuse_runs) -> PreparedMerge:
    """Open the models and plan the result. Raises an error in one sentence if they cannot be merged."""
    build_steps(config)  # names are refused before models are opened
    return plan_merge(config, open_models(config, runs))


def plan_merge(config: MergeConfig, models: ModelSet) -> PreparedMerge:
    """Plan the result of a merge of open models, and try its settings."""
    chosen = build_steps(config)
    targets = plan_output_tensors(config, models)
    base = None
    if models.base is not None:
        base = BaseReader(
            models.by_name[models.base], {target.name: target.base_tensor for target in targets if target.base_tensor}
        )
    merge = PreparedMerge(config, models, chosen, targets, base)
    merge.chat_template()
    _try_settings(merge)
    return merge


def _try_settings(merge: PreparedMerge) -> None:
    """Merge one zero with each setting of the method, so that an invalid one is refused before any tensor is read."""
    seen = []
    targets = {target.name: target for target in merge.output_tensors}
    combined = [target for target in merge.output_tensors if not target.averaged]
    for name, parts in build_model_inputs(merge.steps, combined, merge.models, None).items():
        step, zeros = _step(merge, targets[name]), [part._replace(read_rows=_zero) for part in parts]
        told = (step, [(part.weight, dict(part.overrides)) for part in parts])
        if told not in seen:
            seen.append(told)
            measured = any(part.statistics is not None for part in parts)
            settled = bind_combine(step, dict.fromkeys(targets if measured else [name], (1,)), zeros, MergeContext())
            if not measured:
                list(settled.combine.combine(name, (1,), settled.merge_inputs))
            if seen[0][0] != step and (settled.combine != step or settled.merge_inputs is not zeros):
                raise RecipeError(f"parameters: {step.name} reads whole models; give one value in place of a list")


def _zero(name: str, start: int, stop: int) -> Tensor:  # noqa: ARG001 - read like a delta
    return torch.zeros(stop - start)


@one_thread()
def write_merged_tensors(
    merge: PreparedMerge, output: MergeOutput, context: MergeContext, progress: ProgressCallback
) -> list[MergeInput]:
    """Write every missing tensor. Return the inputs after alignment, by their first part."""
    base = merge.base if merge.is_delta_merge else None
    found = build_model_inputs(merge.steps, merge.output_tensors, merge.models, base)
    found = align_inputs(merge.steps, merge.output_tensors, found, base, context)
    bound = _bind_whole_models(merge, found, context)
    done = 0
    for target in merge.output_tensors:
        if target.name not in output.finished_tensors:
            for start, _, rows in _merge_rows(merge, target, found.get(target.name, []), bound, context):
                output.write_rows(target.name, start, rows)
            output.mark_finished(target.name)
        done += target.form.num_bytes
        progress(done)
    output.flush()
    merged = [target.name for target in merge.output_tensors if not target.is_copied]
    return found[merged[0]] if merged else []


def _bind_whole_models(
    merge: PreparedMerge, found: Mapping[str, Sequence[MergeInput]], context: MergeContext
) -> BoundCombine | None:
    """Bind a method that reads whole models; None for a method that merges each tensor by itself."""
    first = next((target for target in merge.output_tensors if not target.is_copied and not target.averaged), None)
    if first is None:
        return None
    step = _step(merge, first)
    shapes = {target.name: target.form.shape for target in merge.output_tensors if not target.is_copied}
    bound = bind_combine(step, shapes, found[first.name], context)
    return None if bound.combine == step and bound.merge_inputs is found[first.name] else bound


def _step(merge: PreparedMerge, target: OutputTensor) -> CombineStep:
    return merge.steps.combine.build_step(target.layers, target.name, target.depth, merge.config.seed)


def _merge_rows(
    merge: PreparedMerge,
    target: OutputTensor,
    parts: Sequence[MergeInput],
    bound: BoundCombine | None,
    context: MergeContext,
) -> Iterator[tuple[int, int, Tensor]]:
    if target.is_copied:
        yield from _copied(merge, target)
        return
    step = _step(merge, target) if bound is None else bound.combine
    parts = parts if bound is None else bound.merge_inputs
    if target.averaged or (merge.is_delta_merge and target.base_tensor is None):  # a head the base has not
        step, parts = Mean(), shares_of(parts)
    pipeline = MergePipeline((), step, (), ())
    for start, stop, rows in merge_row_chunks(pipeline, target.name, target.form.shape, parts, context):
        whole = _whole(merge, target, start, stop, rows, context)
        _check_finite(merge, target, whole)
        yield start, stop, whole


def _whole(
    merge: PreparedMerge, target: OutputTensor, start: int, stop: int, rows: Tensor, context: MergeContext
) -> Tensor:
    """Return the result's rows: combined, relaxed and added to the base."""
    if target.base_tensor is None or merge.base is None:
        return rows
    if not merge.is_delta_merge and not merge.steps.relax:
        return rows
    base = merge.base.rows(target.name, start, stop)
    delta = rows.reshape(base.shape) if merge.is_delta_merge else rows.reshape(base.shape) - base
    for step in merge.steps.relax:
        delta = step.relax(target.base_tensor, start, delta, context)  # whose statistics have the base's own names
    return base + delta


def _copied(merge: PreparedMerge, target: OutputTensor) -> Iterator[tuple[int, int, Tensor]]:
    """Copy a tensor of integers from the base, or from the first model."""
    part = target.parts[0]
    model, name = merge.models.by_name[part.entry.model], part.tensor
    if target.base_tensor is not None and merge.models.base is not None:
        model, name = merge.models.by_name[merge.models.base], target.base_tensor
    for start, stop in iter_row_chunks(target.form.shape):
        yield start, stop, model.rows(name, start, stop)


def shares_of(parts: Sequence[MergeInput]) -> list[MergeInput]:
    """Scale weights so that they sum to one. If they sum to zero, they become equal."""
    total = sum(part.weight for part in parts)
    return [part._replace(weight=part.weight / total if total else 1 / len(parts)) for part in parts]


def _check_finite(merge: PreparedMerge, target: OutputTensor, rows: Tensor) -> None:
    """Raise ModelError for rows that are not finite, also in the result's data type.

    One pass finds both extremes, which are NaN if one entry is.
    """
    if not rows.numel():
        return
    extremes = torch.stack(rows.aminmax())
    if not bool(extremes.isfinite().all()):
        raise ModelError(_not_finite(merge, target))
    if not fits(extremes, target.form.dtype):
        raise ModelError(too_large(target.name, extremes, target.form.dtype))


def _finite(rows: Tensor) -> bool:
    return not rows.numel() or bool(torch.stack(rows.aminmax()).isfinite().all())


def _not_finite(merge: PreparedMerge, target: OutputTensor) -> str:
    for part in target.parts:
        model = merge.models.by_name[part.entry.model]
        for start, stop in iter_row_chunks(target.form.shape):
            if not _finite(model.rows(part.tensor, start, stop)):
                return f"{model.source}: {part.tensor} holds values that are not finite; take another release"
    return f"{target.name} comes out with values that are not finite; take smaller weights"
