"""Merge state dicts in memory, with the plan and the numbers of a merge of folders."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.merging import MergeContext
from fedtune.offline_merge.merge_config import MergeConfig
from fedtune.offline_merge.model_set import ModelSet, check_forms, check_precision
from fedtune.offline_merge.readers.model_reader import ModelReader
from fedtune.offline_merge.run_merge import plan_merge, write_merged_tensors
from fedtune.offline_merge.safetensors_layout import TensorInfo
from fedtune.offline_merge.write_model import ignore_progress

__all__ = ["merge_state_dicts"]

StateDict = Mapping[str, Tensor]
_NOWHERE = Path()


def merge_state_dicts(config: MergeConfig, named: Mapping[str, StateDict]) -> dict[str, Tensor]:
    """The merged tensors of the models that a configuration names. Tensors that share memory still do so."""
    tied = _find_tied_names(list(named.values()))
    readers = {name: _StateDictReader(name, state, tied) for name, state in named.items()}
    check_forms(readers, config.base_model)
    check_precision(readers, config)
    models = ModelSet(readers, config.base_model, _NOWHERE, _NOWHERE, None, bool(tied), [])
    merge = plan_merge(config, models)
    if merge.steps.needs or merge.steps.renormalise:
        raise ModelError("a step of this merge runs the model, which state dicts do not have; merge folders instead")
    output = _StateDictOutput({target.name: target.form for target in merge.output_tensors})
    write_merged_tensors(merge, output, MergeContext(), ignore_progress)
    return output.tensors | {name: output.tensors[first] for name, first in tied.items()}


class _StateDictReader(ModelReader):
    """A state dict, without the names in ``left_out``."""

    def __init__(self, source: str, state: StateDict, left_out: Mapping[str, str]) -> None:
        self.source, self.folder, self.files = source, _NOWHERE, ()
        self._state = {name: tensor.detach() for name, tensor in state.items() if name not in left_out}
        self.tensor_infos = {name: TensorInfo(tuple(one.shape), one.dtype) for name, one in self._state.items()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Copies of rows on the CPU."""
        tensor = self._state[name]
        rows = (tensor[start:stop] if tensor.dim() else tensor).cpu()
        return rows.to(torch.float32, copy=True) if rows.is_floating_point() else rows.clone()


class _StateDictOutput:
    """The result in memory."""

    def __init__(self, forms: Mapping[str, TensorInfo]) -> None:
        self.tensors = {name: torch.empty(form.shape, dtype=form.dtype) for name, form in forms.items()}
        self.finished_tensors: set[str] = set()

    def write_rows(self, name: str, start: int, rows: Tensor) -> None:
        """Cast rows and put them into their place."""
        target = self.tensors[name]
        place = target[start : start + len(rows)] if target.dim() else target
        place.copy_(rows.reshape(place.shape))

    def mark_finished(self, name: str) -> None:
        """Note that a tensor is complete."""
        self.finished_tensors.add(name)

    def flush(self) -> None:
        """Everything is in memory."""


def _find_tied_names(states: Sequence[StateDict]) -> dict[str, str]:
    """Names of tensors that are, in every state dict, the same memory as an earlier tensor, and that tensor's name."""
    each = [_find_tied_in(state) for state in states]
    return {name: first for name, first in each[0].items() if all(other.get(name) == first for other in each[1:])}


def _find_tied_in(state: StateDict) -> dict[str, str]:
    seen: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    found = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and seen.setdefault(key, name) != name:
            found[name] = seen[key]
    return found
