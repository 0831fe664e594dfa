"""A run's result for plain transformers or peft: a PEFT adapter beside its base, or a whole safetensors model."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import safetensors.torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedtune import models, tasks, techniques
from fedtune.errors import ModelError, StoreError
from fedtune.models.sources import resolve_model_source
from fedtune.recipe.schema import Recipe
from fedtune.techniques import Technique
from fedtune.training import prepare_model, set_model_state

__all__ = ["Format", "describe_missing_tensors", "export_model", "write"]

Format = Literal["adapter", "full"]


def export_model(recipe: Recipe, state: Mapping[str, Tensor], folder: Path, form: Format | None, card: str) -> Format:
    """Write the model a state makes to a new folder and return its form; an adapter where PEFT can carry it.

    ``card`` becomes the folder's README, with the remark below it. Raises ModelError when an adapter is asked for that
    PEFT cannot carry, and StoreError when the folder exists already.
    """
    return write(
        recipe,
        tasks.load_data(recipe, tasks.load_class_names(recipe)).label_names,
        state,
        folder,
        form,
        card,
    )


def write(
    recipe: Recipe, labels: Sequence[str], state: Mapping[str, Tensor], folder: Path, form: Format | None, card: str
) -> Format:
    """What ``export_model`` does, for a model whose class names are known."""
    model, chosen, _ = prepare_model(recipe, labels)
    set_model_state(model, state)
    carried = _carried(model, chosen, recipe, state) if form != "full" else None
    if form == "adapter" and carried is None:
        raise ModelError(f"{_joined(chosen)} trains what no PEFT adapter can carry; export with --format full")
    with _new_folder(folder) as beside:
        if carried is not None:
            _save_adapter(*carried, model, recipe, beside)
        else:
            _save_full(model, chosen, recipe, labels, beside)
        said = card + describe_missing_tensors(recipe) + ("" if carried is None else _adapter_remark(recipe, labels))
        (beside / "README.md").write_text(said, encoding="utf-8")
    return "full" if carried is None else "adapter"


def describe_missing_tensors(recipe: Recipe) -> str:
    """Return a note about trained tensors that the export cannot contain, or an empty text."""
    if any(technique.has_local_tensors() for technique in techniques.build_techniques(recipe.train.techniques)):
        return (
            "The batch-norm layers have their values from before training, because each device keeps its own trained "
            "batch norms.\n"
        )
    return ""


def _carried(
    model: nn.Module, chosen: tuple[Technique, ...], recipe: Recipe, state: Mapping[str, Tensor]
) -> tuple[PeftConfig, dict[str, Tensor]] | None:
    """An adapter's configuration and tensors, if they hold all that the base has not, and plain transformers loads it.

    What was drawn for want of weights, such as a pooler, goes with the adapter: nobody else would draw the same.
    """
    trains = [technique for technique in chosen if technique.selects_trainable_tensors]
    kept = all(technique.has_unchanged_base() for technique in chosen)
    carried = len(trains) == 1 and kept and isinstance(model, PreTrainedModel)
    adapter = trains[0].make_peft_config(model, tasks.get_task(recipe.task)) if carried else None
    if adapter is None:
        return None
    drawn = trains[0].compute_merged_weights(
        model, [name for name in vars(model).get("drawn", ()) if name not in state]
    )
    if drawn is None:
        return None
    whole = sorted({name.rpartition(".")[0] for name in drawn})
    inside = tuple(f"{name}." for name in whole)
    adapter.target_modules = {name for name in adapter.target_modules if name not in whole}
    adapter.modules_to_save = sorted([*(adapter.modules_to_save or []), *whole]) or None
    adapter.base_model_name_or_path = resolve_model_source(recipe.model.source)
    learned = {name: tensor for name, tensor in state.items() if not name.startswith(inside)}
    return adapter, {**_statistics(model, adapter.modules_to_save or []), **learned, **drawn}


def _statistics(model: nn.Module, saved: Sequence[str]) -> dict[str, Tensor]:
    """Buffers of modules that are saved whole, such as a head's batch norm; peft wants them all."""
    inside = tuple(f"{name}." for name in saved)
    buffers = dict(model.named_buffers()).keys() & model.state_dict().keys()
    return {name: model.get_buffer(name) for name in sorted(buffers) if name.startswith(inside)}


def _save_adapter(
    adapter: PeftConfig, tensors: Mapping[str, Tensor], model: nn.Module, recipe: Recipe, folder: Path
) -> None:
    adapter.save_pretrained(folder)
    named = {f"base_model.model.{name.replace('.default.', '.')}": tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(named, folder / "adapter_model.safetensors")
    if tasks.get_task(recipe.task).has_new_head:
        models.save_config(model, folder)
        _save_reader(recipe, folder)


def _adapter_remark(recipe: Recipe, labels: Sequence[str]) -> str:
    """How a classifier's adapter is loaded: class names and padding id are those of the configuration beside it."""
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


def _save_full(
    model: nn.Module, chosen: tuple[Technique, ...], recipe: Recipe, labels: Sequence[str], folder: Path
) -> None:
    techniques.merge_into_weights(chosen, model)
    models.save_model(model, labels, folder)
    tasks.get_task(recipe.task).save_model_extras(model, recipe, folder)
    _save_reader(recipe, folder)


def _save_reader(recipe: Recipe, folder: Path) -> None:
    """What turns texts or pictures into the model's inputs, as the recipe has it."""
    task = tasks.get_task(recipe.task)
    task.save_reader(task.load_reader(recipe), folder)


def _joined(chosen: tuple[Technique, ...]) -> str:
    return "+".join(technique.name for technique in chosen)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside the wanted one, renamed to it when the block ends well."""
    if folder.exists():
        raise StoreError(f"{folder} exists already; choose another folder with -o")
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=f".{folder.name}."))
    try:
        yield beside
        os.chmod(beside, 0o755)
        beside.replace(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
