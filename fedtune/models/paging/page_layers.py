"""Puts the matrices of a model's plain layers into a store, whoever built the model."""

import warnings
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from fedtune.errors import FedtuneWarning
from fedtune.models.paging.byte_readers import FileBytes
from fedtune.models.paging.paged_layers import PagedEmbedding, PagedLinear, refuse_saving_placeholders
from fedtune.models.paging.paged_matrix import PagedMatrix
from fedtune.models.paging.row_formats import QUANTISED
from fedtune.models.paging.source_tensors import SourceTensor
from fedtune.models.paging.store import make_store, open_store

__all__ = ["PagedSource", "is_plain_layer", "list_pageable_layers", "page_layers", "warn_of_memory"]

_MUCH = 0.05
"""The share of the weights from which on a warning says that they are in memory."""


class PagedSource(NamedTuple):
    """A source as the recipe names it, its folder, the tensors of its files, and the row format that is asked for.

    ``form`` is True for the format of the source.
    """

    name: str
    location: str
    tensors: Mapping[str, SourceTensor]
    form: str | bool


def page_layers(model: nn.Module, layers: Mapping[str, str], source: PagedSource, dtype: torch.dtype) -> None:
    """Let layers read their matrices from a store. ``layers`` has the name of each one's tensor in the files.

    In int8 and nf4, embeddings and the output layer stay as they are in the source.
    """
    if not layers:
        return
    store = make_store(source.tensors, _choose_forms(model, layers, source))
    matrices = open_store(store, dtype, FileBytes)
    for name, key in layers.items():
        model.set_submodule(name, _make_paged(model.get_submodule(name), matrices[key]))
    refuse_saving_placeholders(model)


def list_pageable_layers(model: nn.Module, prefix: str) -> list[str]:
    """Return the names of plain linear layers and embeddings that begin with a prefix."""
    return [name for name, layer in model.named_modules() if is_plain_layer(layer) and name.startswith(prefix)]


def is_plain_layer(layer: nn.Module) -> bool:
    """Whether a layer does nothing but multiply by its weight, or look up its rows."""
    return type(layer) is nn.Linear or (type(layer) is nn.Embedding and layer.max_norm is None)


def _choose_forms(model: nn.Module, layers: Mapping[str, str], source: PagedSource) -> dict[str, str]:
    """The row format of each tensor in the order of the layers, in which they are read."""
    able: Any = model
    output, form = able.get_output_embeddings(), source.form
    whole = {
        key
        for name, key in layers.items()
        if form is True or (form in QUANTISED and _is_end(model.get_submodule(name), output))
    }
    return {key: source.tensors[key].form if key in whole else str(form) for key in layers.values()}


def _is_end(layer: nn.Module, output: nn.Module | None) -> bool:
    return isinstance(layer, nn.Embedding) or layer is output


def _make_paged(plain: nn.Module, matrix: PagedMatrix) -> nn.Module:
    if isinstance(plain, nn.Embedding):
        made: nn.Module = PagedEmbedding(matrix, plain.padding_idx)
    else:
        assert isinstance(plain, nn.Linear)
        made = PagedLinear(matrix, plain.bias)
    return made.train(plain.training)


def warn_of_memory(source: PagedSource, paged: Collection[str], sizes: Mapping[str, int]) -> None:
    """Warn if much of the model is in memory after all: matrices of these sizes, beside the tensors that are paged."""
    held, left = sum(sizes.values()), sum(source.tensors[key].rows * source.tensors[key].width for key in set(paged))
    if held > _MUCH * (held + left):
        largest = max(sizes, key=lambda name: sizes[name])
        warnings.warn(
            f"{source.name}: model.paged leaves {held / (held + left):.0%} of the matrices in memory, such as "
            f"{largest}, because their layers are no plain linear layers or embeddings",
            FedtuneWarning,
            stacklevel=2,
        )
