"""Consolidation of a task: a merge of the state at its end with the one at its begin, which takes back a part of it.

The operand is the change of the task, theta_t - theta*_(t-1), so that steps which scale a merged delta apply as they
are. Fisher information weights both ends.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedtune import merging
from fedtune.errors import RecipeError
from fedtune.merging import ActivationStatistics, CombineStep, MergeContext, MergeInput, MergePipeline, RelaxStep
from fedtune.recipe.schema import Unit
from fedtune.recipe.unit_registry import build_unit

__all__ = ["BorderEvidence", "HeldTensors", "build_consolidation", "consolidate_task", "merge_onto"]

Tensors = Mapping[str, Tensor]
_KEY = "stream.consolidate"


class HeldTensors(dict[str, Tensor]):
    """Tensors in memory, read like a model's delta."""

    def __call__(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of one, fp32."""
        return (self[name][start:stop] if self[name].dim() else self[name]).float()


class BorderEvidence(NamedTuple):
    """What was measured on examples: the inputs of earlier tasks, and Fisher sums of earlier tasks and of this one."""

    activation_statistics: Mapping[str, ActivationStatistics] = {}
    earlier_fisher: Mapping[str, Tensor] = {}
    newest_fisher: Mapping[str, Tensor] = {}


def build_consolidation(units: Sequence[Unit]) -> MergePipeline:
    """Return the steps at a border as a merge of one change; RecipeError for steps that do not fit one.

    The activity of inputs is measured by the clients, on the examples of their tasks.
    """
    steps = [build_unit("fedtune.merging", unit, _KEY) for unit in units]
    combining = [step for step in steps if isinstance(step, CombineStep)]
    relaxing = tuple(_measured_by_clients(step) for step in steps if isinstance(step, RelaxStep))
    if [step.name for step in combining] not in ([], ["fisher"]) or len(steps) > len(combining) + len(relaxing):
        names = ", ".join(step.name for step in steps)
        raise RecipeError(
            f"{_KEY}: {names}: a border takes fisher once, aim, shrink, average or experts; other steps merge several "
            "models, as experts does: {experts: {merge: [...]}}"
        )
    if merging.build_calibration_request(relaxing) and combining:
        raise RecipeError(f"{_KEY}: fisher and aim both weight what the new task changes; choose one of them")
    combine = combining[0] if combining else build_unit("fedtune.merging", Unit(name="mean"), _KEY)
    return MergePipeline((), combine, relaxing, ())


def _measured_by_clients(step: RelaxStep) -> RelaxStep:
    if getattr(step, "measured_by", "clients") == "clients":
        return step
    if "measured_by" in step.model_fields_set:
        raise RecipeError(f"{_KEY}: the server has no inputs of earlier tasks; drop measured_by of {step.name}")
    return step.model_copy(update={"measured_by": "clients"})


def consolidate_task(
    pipeline: MergePipeline, before: Tensors, after: Tensors, evidence: BorderEvidence
) -> dict[str, Tensor]:
    """Return the consolidated state. A tensor or an entry whose change no step touches keeps the bits of ``after``.

    Fisher information merges those tensors alone whose information is known at both ends.
    """
    context = MergeContext(activation_statistics=evidence.activation_statistics)
    found = dict(after)
    for name in _list_changed(pipeline, before, after, evidence):
        change = after[name].float() - before[name].float()
        merged = _merge_change(pipeline, name, change, evidence, context)
        moved = (before[name].float() + merged).to(after[name].dtype)
        found[name] = torch.where(merged == change, after[name], moved)
    return found


def _list_changed(pipeline: MergePipeline, before: Tensors, after: Tensors, evidence: BorderEvidence) -> list[str]:
    known = [name for name in after if name in before and after[name].is_floating_point()]
    if pipeline.combine.name != "fisher":
        return known
    return [name for name in known if name in evidence.earlier_fisher and name in evidence.newest_fisher]


def _merge_change(
    pipeline: MergePipeline, name: str, change: Tensor, evidence: BorderEvidence, context: MergeContext
) -> Tensor:
    operands = [MergeInput(HeldTensors({name: change}), 1.0)]
    if pipeline.combine.name == "fisher":
        ends = ((torch.zeros_like(change), evidence.earlier_fisher), (change, evidence.newest_fisher))
        operands = [
            MergeInput(HeldTensors({name: delta}), 0.5, {}, HeldTensors({name: fisher[name]})) for delta, fisher in ends
        ]
    return merge_onto(pipeline, {name: torch.zeros_like(change)}, operands, context)[name]


def merge_onto(
    pipeline: MergePipeline, base: Tensors, merge_inputs: Sequence[MergeInput], context: MergeContext
) -> dict[str, Tensor]:
    """Return the base with the merged and relaxed deltas added, tensor by tensor, fp32."""
    shapes = {name: tuple(tensor.shape) for name, tensor in base.items()}
    combine, merge_inputs = merging.bind_combine(pipeline.combine, shapes, merge_inputs, context)
    bound = pipeline._replace(combine=combine)
    found = {name: tensor.float().clone() for name, tensor in base.items()}
    for name, tensor in found.items():
        rows = tensor if tensor.dim() else tensor.unsqueeze(0)
        for start, stop, delta in merging.merge_row_chunks(bound, name, shapes[name], merge_inputs, context):
            rows[start:stop] += delta.reshape(rows[start:stop].shape)
    return found
