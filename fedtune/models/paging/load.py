"""Loads a transformers model whose matrices stay in a store.

transformers builds the model from stand-ins for the file's tensors, so that names, shapes, the drawing of a new head
and every check are those of a model in memory. Matrices of plain linear layers and embeddings become placeholders; all
other tensors, such as norms and biases, are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.models.auto.auto_factory import _get_model_class

from fedtune.errors import ModelError
from fedtune.models.paging.page_layers import PagedSource, is_plain_layer, page_layers, warn_of_memory
from fedtune.models.paging.paged_layers import PagedEmbedding, PagedLinear, make_placeholder
from fedtune.models.paging.source_tensors import SourceTensor
from fedtune.models.read_past import read_past

__all__ = ["load_paged_model"]


def load_paged_model(
    source: PagedSource,
    auto_class: Any,
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    has_new_head: bool,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the model and transformers' loading info. Missing weights are drawn from the global generator.

    In int8 and nf4, embeddings and the output layer stay as they are in the source. A classifier's head is trained, so
    it is in memory.
    """
    named, location, tensors, _ = source
    stand_ins = _StandIns(tensors)
    model, info = _get_model_class(config, auto_class._model_mapping).from_pretrained(
        None,
        config=config,
        state_dict=stand_ins.make_state_dict(),
        dtype=dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    if any(isinstance(one, WeightConverter) for one in model._weight_conversions):
        raise ModelError(
            f"{named} joins several tensors of its file into one weight, which model.paged does not do; drop it"
        )
    model.config.name_or_path = model.name_or_path = location
    _load_generation_config(model, location)
    layers = _list_pageable(model, stand_ins, f"{model.base_model_prefix}." if has_new_head else "")
    page_layers(model, layers, source, dtype)
    warn_of_memory(source, layers.values(), _read_rest(model, stand_ins))
    return model, info


@dataclass
class _StandIns:
    """What transformers gets in the place of the tensors of the files."""

    tensors: Mapping[str, SourceTensor]
    names: dict[int, tuple[str, Tensor]] = field(default_factory=dict)
    """The tensor that a placeholder stands for, by the address of its memory, which the entry keeps in use."""

    def make_state_dict(self) -> dict[str, "_StandIn"]:
        """Return an entry for each tensor."""
        return {name: _StandIn(name, tensor, self.names) for name, tensor in self.tensors.items()}

    def find_source_name(self, parameter: Tensor) -> str | None:
        """Return the name of the tensor that a parameter of the model stands for; None if it was read or drawn."""
        return self.names.get(parameter.data_ptr(), (None,))[0] if parameter.dim() == 2 else None


@dataclass
class _StandIn:
    """Behaves like the slice of a safetensors file as far as loading goes: it becomes a tensor when it is moved."""

    name: str
    tensor: SourceTensor
    names: dict[int, tuple[str, Tensor]]

    def __getitem__(self, _: Any) -> "_StandIn":
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """Return a placeholder for a matrix, and the contents of another tensor."""
        if len(self.tensor.shape) != 2:
            return self.tensor.read_whole().to(dtype)
        placeholder = make_placeholder(*self.tensor.shape, dtype or torch.float32).data
        self.names[placeholder.data_ptr()] = self.name, placeholder
        return placeholder


def _list_pageable(model: PreTrainedModel, stand_ins: _StandIns, prefix: str) -> dict[str, str]:
    """The tensor of each layer that is paged, by the layer's name. Each user of a paged tensor is such a layer.

    ``prefix`` begins the names of all that stays frozen.
    """
    direct = read_past(model)
    found: dict[str, str] = {}
    others: set[str] = set()
    for name, layer in model.named_modules():
        for last, parameter in layer._parameters.items():
            key = None if parameter is None else stand_ins.find_source_name(parameter)
            if (
                key is not None
                and last == "weight"
                and is_plain_layer(layer)
                and name not in direct
                and name.startswith(prefix)
            ):
                found[name] = key
            elif key is not None:
                others.add(key)
    return {name: key for name, key in found.items() if key not in others}


def _read_rest(model: PreTrainedModel, stand_ins: _StandIns) -> dict[str, int]:
    """Read the matrices that are not paged, and return their sizes."""
    sizes: dict[str, int] = {}
    read: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        key = stand_ins.find_source_name(parameter)
        if key is None or isinstance(owner, PagedLinear | PagedEmbedding):
            continue
        read[key] = read[key] if key in read else stand_ins.tensors[key].read_whole().to(parameter.dtype)
        parameter.data = read[key]
        sizes[name] = parameter.numel()
    return sizes


def _load_generation_config(model: PreTrainedModel, location: str) -> None:
    """Take over the generation settings of the source, as transformers does when it loads weights itself."""
    if model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(location)
        except OSError:  # the folder has none: those made of the configuration stay
            return
