"""Loads a model of plain blocks from a folder, in memory or with its matrices in a store.

Its parameters have the names, the order and the bits of the model that transformers loads, drawn heads included.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fedtune.models.blocks.block_model import BlockModel
from fedtune.models.blocks.configuration import UnknownBlocksError, read_configuration
from fedtune.models.blocks.decoder import LanguageModel
from fedtune.models.blocks.decoder_configuration import DECODERS, read_decoder_shape
from fedtune.models.blocks.encoder import TextClassifier
from fedtune.models.blocks.encoder_configuration import ENCODERS, read_encoder_shape
from fedtune.models.blocks.shape_only import build_shapes_only
from fedtune.models.head_problem import check_head_problem
from fedtune.models.model_task import ModelTask
from fedtune.models.new_head import warn_of_new_head
from fedtune.models.paging.page_layers import PagedSource, list_pageable_layers, page_layers
from fedtune.models.paging.source_tensors import SourceTensor
from fedtune.recipe.schema import ModelSettings

__all__ = ["build_block_skeleton", "load_block_model"]


@dataclass(frozen=True)
class _Weights:
    """The tensors of the files, the file's name of each parameter, and the parameters that are drawn."""

    tensors: Mapping[str, SourceTensor]
    keys: dict[str, str]
    drawn: list[str]


def load_block_model(
    model: ModelSettings,
    folder: Path,
    tensors: Mapping[str, SourceTensor],
    task: ModelTask,
    labels: Sequence[str],
    seed: int,
) -> BlockModel:
    """Load the model in ``folder``; UnknownBlocksError if it is not one that is built here bit for bit.

    Missing weights of a head are drawn from ``seed``.
    """
    settings = read_configuration(folder)
    with build_shapes_only():
        made = _build(model, settings, task, labels)
    weights = _match_weights(made, tensors, has_new_head=task.has_new_head)
    dtype = getattr(torch, model.dtype)
    if model.paged:
        _page(made, weights, PagedSource(model.source, str(folder), tensors, model.paged), dtype, task)
    else:
        _read(made, weights, dtype)
    _draw(made, weights, dtype, seed, float(settings.get("initializer_range") or 0.02))
    _warn_of_head(model.source, made, weights)
    made.drawn = sorted(name for name in weights.drawn if name not in tensors)
    return made.eval()


def build_block_skeleton(
    model: ModelSettings,
    folder: Path,
    tensors: Mapping[str, SourceTensor] | None,
    task: ModelTask,
    labels: Sequence[str],
) -> BlockModel:
    """Build the model that ``load_block_model`` loads, with drawn weights; UnknownBlocksError if it would not load it.

    Of ``tensors``, only names and shapes are read; without them, the configuration decides alone.
    """
    made, dtype = _build(model, read_configuration(folder), task, labels), getattr(torch, model.dtype)
    if tensors is not None:
        _match_weights(made, tensors, has_new_head=task.has_new_head)
    for name, parameter in list(made.named_parameters()):
        if parameter.dtype != dtype:
            _set(made, name, parameter.detach().to(dtype))
    return made.eval()


def _build(model: ModelSettings, settings: Mapping[str, Any], task: ModelTask, labels: Sequence[str]) -> BlockModel:
    kind = settings.get("model_type")
    if task.auto_class == "AutoModelForCausalLM" and kind in DECODERS and not task.has_new_head:
        return LanguageModel(read_decoder_shape(settings))
    if task.auto_class == "AutoModelForSequenceClassification" and kind in ENCODERS:
        check_head_problem(model.source, _find_problem(settings), task)
        head = task.make_head_settings(labels)
        num_labels = int(head.get("num_labels", len(labels)))
        return TextClassifier(read_encoder_shape(settings, num_labels, head["problem_type"]))
    raise UnknownBlocksError(f"it is a {kind} model for {task.name}")


def _find_problem(settings: Mapping[str, Any]) -> str | None:
    """The kind of label that a checkpoint's head was trained for; None if its configuration does not say so."""
    if settings.get("problem_type") is not None:
        return str(settings["problem_type"])
    labels = settings.get("id2label")
    return "regression" if (len(labels) if labels else settings.get("num_labels", 2)) == 1 else None


def _match_weights(made: BlockModel, tensors: Mapping[str, SourceTensor], *, has_new_head: bool) -> _Weights:
    """Find the tensor of each parameter; UnknownBlocksError where transformers would do more than that."""
    prefix = f"{made.base_model_prefix}."
    is_bare = not any(name.startswith(prefix) for name in tensors)  # the files of a backbone without a head
    weights = _Weights(tensors, {}, [])
    for name, parameter in made.named_parameters(remove_duplicate=False):
        is_head, wanted = not name.startswith(prefix), tuple(parameter.shape)
        key = name.removeprefix(prefix) if is_bare else name
        found = tensors[key].shape if key in tensors else None
        if _is_tied(made, name):
            if found is not None:
                raise UnknownBlocksError(f"its files have {name}, which its configuration ties to another tensor")
        elif found == wanted and not (is_head and is_bare):
            weights.keys[name] = key
        elif _may_be_drawn(name, is_new=is_head and has_new_head, is_there=found is not None) and (
            found is None or (found[1:] == wanted[1:] and not is_bare)
        ):
            weights.drawn.append(name)
        else:
            raise UnknownBlocksError(f"its files have no {name} of the shape {list(wanted)}")
    return weights


def _is_tied(made: BlockModel, name: str) -> bool:
    return name not in dict(made.named_parameters())


def _may_be_drawn(name: str, *, is_new: bool, is_there: bool) -> bool:
    """Whether transformers draws a parameter: that of a new head, or of a pooler that is not there."""
    return is_new or (".pooler." in name and not is_there)


def _page(made: BlockModel, weights: _Weights, source: PagedSource, dtype: torch.dtype, task: ModelTask) -> None:
    """Read the small tensors, and leave the matrices in a store. A new head is in memory."""
    layers = {
        name: weights.keys[f"{name}.weight"]
        for name in list_pageable_layers(made, f"{made.base_model_prefix}." if task.has_new_head else "")
        if f"{name}.weight" in weights.keys
    }
    layers |= _list_tied_layers(made, layers)
    for name, key in weights.keys.items():
        if name.removesuffix(".weight") not in layers:
            _set(made, name, weights.tensors[key].read_whole().to(dtype))
    page_layers(made, layers, source, dtype)


def _list_tied_layers(made: BlockModel, layers: Mapping[str, str]) -> dict[str, str]:
    """The output layer, if it shares the matrix of the input layer."""
    output = made.get_output_embeddings()
    if output is None or output.weight is not made.get_input_embeddings().weight:
        return {}
    by_module = {id(module): name for name, module in made.named_modules()}
    return {by_module[id(output)]: layers[by_module[id(made.get_input_embeddings())]]}


def _read(made: BlockModel, weights: _Weights, dtype: torch.dtype) -> None:
    """Read all tensors. Those of the right type stay views of the mapped file."""
    for file in sorted({weights.tensors[key].file for key in weights.keys.values()}):
        with safe_open(file, framework="pt") as opened:
            for name, key in weights.keys.items():
                if weights.tensors[key].file == file:
                    _set(made, name, opened.get_tensor(key).to(dtype))


def _set(made: BlockModel, name: str, value: Tensor) -> None:
    """Put a tensor in the place of a parameter, in each layer that shares it."""
    before, parameter = made.get_parameter(name), nn.Parameter(value)
    for module in made.modules():
        for last, one in module._parameters.items():
            if one is before:
                module._parameters[last] = parameter


def _draw(made: BlockModel, weights: _Weights, dtype: torch.dtype, seed: int, spread: float) -> None:
    """Draw weights from N(0, spread ** 2), in the order of the layers. Biases are 0."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for name in weights.drawn:
            value = torch.zeros(made.get_parameter(name).shape, dtype=dtype)
            _set(made, name, value if name.endswith("bias") else value.normal_(0.0, spread))


def _warn_of_head(source: str, made: BlockModel, weights: _Weights) -> None:
    replaced = sorted(name for name in weights.drawn if name in weights.tensors)
    for name in replaced[:1]:
        warn_of_new_head(source, weights.tensors[name].shape[0], len(made.get_parameter(name)))
