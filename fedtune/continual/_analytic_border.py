"""The server's part of an analytic head: add the sums of a task and write the head that they give into the state."""

import warnings
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fedtune.continual._analytic_heads import LinearHead, choose_ridge_by_halves, fit_ridge, fit_slda
from fedtune.continual._analytic_round import read_sums
from fedtune.continual._counted_sums import CountedSums, make_counted_sums, read_counted_sums
from fedtune.continual._head_features import find_head_layer, hash_backbone
from fedtune.continual._method import Border, BorderResult, TaskUpload
from fedtune.continual._plan import StreamPlan
from fedtune.errors import FedtuneWarning

__all__ = ["AnalyticHead", "find_head_names", "refit_head", "write_head"]

Tensors = Mapping[str, Tensor]


class AnalyticHead(NamedTuple):
    """How the head is computed from sums."""

    form: Literal["slda", "ridge"]
    shrinkage: float
    ridge: float | Literal["halves"]

    def fit(self, sums: CountedSums) -> LinearHead:
        """Return the head."""
        if self.form == "slda":
            return fit_slda(sums.total, self.shrinkage)
        if self.ridge != "halves":
            return fit_ridge(sums.total, self.ridge)
        return fit_ridge(sums.total, choose_ridge_by_halves(*sums.halves))


def refit_head(border: Border, settings: AnalyticHead, *, renews: bool) -> BorderResult:
    """Return the state with the head of all sums so far. Without a usable upload nothing changes."""
    backbone = hash_backbone(border.model, border.after)
    uploads = [one for one in border.uploads if _has_backbone(one, backbone, border)]
    if not uploads:
        _warn(f"no sums arrived for task {_name_tasks(border)[border.task]}, so the head stays as it is")
        return BorderResult(border.after, border.memory)
    sums = _renew_sums(border, uploads, backbone) if renews else _add_sums(border, uploads, backbone)
    memory = sums.list_tensors()
    if not sums.total.counts.any():
        return BorderResult(border.after, memory)
    head = _keep_unrenewed(border, settings.fit(sums), sums.total.counts) if renews else settings.fit(sums)
    return BorderResult(write_head(border, head), memory)


def _has_backbone(upload: TaskUpload, backbone: Tensor, border: Border) -> bool:
    fits = torch.equal(upload.tensors["backbone"], backbone)
    if not fits:
        _warn(
            f"client {upload.client} summed the features of another backbone in round {border.round_number}, so its "
            "sums are left out; let all devices train the same tensors"
        )
    return fits


def _start_sums(border: Border, backbone: Tensor) -> CountedSums:
    classes, width = find_head_layer(border.model)[1].weight.shape
    return make_counted_sums(classes, width, len(_name_tasks(border)), border.recipe.num_clients, backbone)


def _add_sums(border: Border, uploads: list[TaskUpload], backbone: Tensor) -> CountedSums:
    """Return the memory with the task's sums; sums of another backbone are dropped."""
    known = read_counted_sums(border.memory) if border.memory else _start_sums(border, backbone)
    if not torch.equal(known.backbone, backbone):
        _warn("the backbone has changed since the sums of earlier tasks, which are dropped; set tune: every")
        known = _start_sums(border, backbone)
    return known.add_task(border.task, {one.client: read_sums(one.tensors) for one in uploads})


def _renew_sums(border: Border, uploads: list[TaskUpload], backbone: Tensor) -> CountedSums:
    """Return memory of this round's sums alone, and warn of what was counted before and is not among them."""
    fresh = _start_sums(border, backbone).add_task(border.task, {one.client: read_sums(one.tensors) for one in uploads})
    fresh.counted.zero_()
    for one in uploads:
        fresh.counted[:, one.client] = one.tensors["included"]
    if border.memory:
        _warn_of_lost(border, read_counted_sums(border.memory).counted > fresh.counted)
    return fresh


def _warn_of_lost(border: Border, lost: Tensor) -> None:
    parts = [
        f"{name} of clients {', '.join(map(str, torch.nonzero(row)[:, 0].tolist()))}"
        for name, row in zip(_name_tasks(border), lost, strict=True)
        if row.any()
    ]
    if parts:
        _warn(f"the backbone moved, and these sums could not be renewed: {'; '.join(parts)}")


def _keep_unrenewed(border: Border, head: LinearHead, counts: Tensor) -> LinearHead:
    """Return the head with the earlier rows of classes that have no examples in the sums any more."""
    if not border.memory:
        return head
    weight, *biases = (border.before[name].double() for name in find_head_names(border.model))
    lost = (counts == 0) & weight.any(1)
    bias = torch.where(lost, biases[0], head.bias) if biases else head.bias
    return LinearHead(torch.where(lost[:, None], weight, head.weight), bias)


def write_head(border: Border, head: LinearHead) -> dict[str, Tensor]:
    """Return the state after the task with the head in it, in single precision."""
    found = dict(border.after)
    for name, tensor in zip(find_head_names(border.model), head, strict=False):
        found[name] = tensor.to(found[name].dtype)
    return found


def find_head_names(model: nn.Module) -> list[str]:
    """Return the names of the head's weight and bias in the state; the bias may be missing."""
    name, layer = find_head_layer(model)
    return [f"{name}.{part}" for part, _ in layer.named_parameters()]


def _name_tasks(border: Border) -> tuple[str, ...]:
    return StreamPlan(border.recipe).task_names


def _warn(sentence: str) -> None:
    warnings.warn(f"analytic: {sentence}", FedtuneWarning, stacklevel=2)
