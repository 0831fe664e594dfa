"""A PEFT adapter with all trained tensors, for techniques whose result PEFT can load."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedtune import models, tasks
from fedtune.export.safetensors_model import save_preprocessing
from fedtune.models.sources import resolve_model_source
from fedtune.recipe.schema import Recipe
from fedtune.techniques import Technique

__all__ = ["PeftAdapter", "describe_adapter_loading", "make_peft_adapter", "save_peft_adapter"]


class PeftAdapter(NamedTuple):
    """The configuration of an adapter, and its tensors by their names in the model."""

    config: PeftConfig
    tensors: dict[str, Tensor]


def make_peft_adapter(
    model: nn.Module, chosen: tuple[Technique, ...], recipe: Recipe, state: Mapping[str, Tensor]
) -> PeftAdapter | None:
    """Return the adapter if it can hold everything that differs from the base, and plain transformers can load it.

    Weights that the base lacks and that were initialised at random, such as a pooler, are part of the adapter.
    """
    trains = [technique for technique in chosen if technique.selects_trainable_tensors]
    unchanged_base = all(technique.has_unchanged_base() for technique in chosen)
    possible = len(trains) == 1 and unchanged_base and isinstance(model, PreTrainedModel)
    config = trains[0].make_peft_config(model, tasks.get_task(recipe.task)) if possible else None
    if config is None:
        return None
    drawn = trains[0].compute_merged_weights(
        model, [name for name in vars(model).get("drawn", ()) if name not in state]
    )
    if drawn is None:
        return None
    whole = sorted({name.rpartition(".")[0] for name in drawn})
    inside = tuple(f"{name}." for name in whole)
    config.target_modules = {name for name in config.target_modules if name not in whole}
    config.modules_to_save = sorted([*(config.modules_to_save or []), *whole]) or None
    config.base_model_name_or_path = resolve_model_source(recipe.model.source)
    factors = {**_list_frozen_factors(model, trains[0], state), **state}
    trained = {name: tensor for name, tensor in factors.items() if not name.startswith(inside)}
    return PeftAdapter(config, {**_list_buffers(model, config.modules_to_save or []), **trained, **drawn})


def _list_frozen_factors(model: nn.Module, technique: Technique, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the factors that no round trains and no state has, such as A with b-only. PEFT would draw others."""
    factors = {name for pair in technique.list_low_rank_pairs(model) for name in (pair.left, pair.right)}
    return {name: model.get_parameter(name).detach().clone() for name in sorted(factors - state.keys())}


def _list_buffers(model: nn.Module, saved: Sequence[str]) -> dict[str, Tensor]:
    """Return the buffers of modules that are saved whole, such as a head's batch norm. PEFT requires all of them."""
    inside = tuple(f"{name}." for name in saved)
    buffers = dict(model.named_buffers()).keys() & model.state_dict().keys()
    return {name: model.get_buffer(name) for name in sorted(buffers) if name.startswith(inside)}


def save_peft_adapter(adapter: PeftAdapter, model: nn.Module, recipe: Recipe, folder: Path) -> None:
    """Write the adapter; for a classifier also the model's configuration. The reader follows if the task changes it."""
    adapter.config.save_pretrained(folder)
    named = {f"base_model.model.{name.replace('.default.', '.')}": tensor for name, tensor in adapter.tensors.items()}
    safetensors.torch.save_file(named, folder / "adapter_model.safetensors")
    task = tasks.get_task(recipe.task)
    if task.has_new_head:
        models.save_config(model, folder)
    if task.changes_reader:
        save_preprocessing(recipe, folder)


def describe_adapter_loading(recipe: Recipe, labels: Sequence[str]) -> str:
    """Return how to load a classifier's adapter: the configuration beside it has the class names and padding id."""
    if not labels:
        return ""
    kind = tasks.get_task(recipe.task).auto_class
    return (
        f"\nClasses: {', '.join(labels)}. Load the base with the configuration in this folder, then the adapter:\n\n"
        "```python\n"
        f"from peft import PeftModel\nfrom transformers import AutoConfig, {kind}\n\n"
        'config = AutoConfig.from_pretrained("THIS FOLDER")\n'
        f'base = {kind}.from_pretrained("{resolve_model_source(recipe.model.source)}", config=config)\n'
        'model = PeftModel.from_pretrained(base, "THIS FOLDER")\n'
        "```\n"
    )
