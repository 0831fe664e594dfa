"""Write the result of a run to a new folder, in the form that plain transformers or PEFT can load."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from torch import Tensor

from fedtune import algorithms, continual, tasks, techniques
from fedtune.errors import ModelError, StoreError
from fedtune.export.peft_adapter import describe_adapter_loading, make_peft_adapter, save_peft_adapter
from fedtune.export.safetensors_model import save_whole_model
from fedtune.recipe.schema import Recipe
from fedtune.techniques import Technique
from fedtune.training import prepare_model, set_model_state

__all__ = ["Format", "describe_missing_tensors", "export_model", "write_export"]

Format = Literal["adapter", "model"]


def export_model(recipe: Recipe, state: Mapping[str, Tensor], folder: Path, form: Format | None, card: str) -> Format:
    """Write the model of a state to a new folder and return its form. By default an adapter, if PEFT can load it.

    ``card`` becomes the README of the folder, with notes below it. Raises ModelError if an adapter is requested that
    PEFT cannot load, and StoreError if the folder exists.
    """
    labels = tasks.load_data(recipe, tasks.load_class_names(recipe)).label_names
    return write_export(recipe, labels, state, folder, form, card)


def write_export(
    recipe: Recipe, labels: Sequence[str], state: Mapping[str, Tensor], folder: Path, form: Format | None, card: str
) -> Format:
    """Do the same as ``export_model`` for a model whose class names are known."""
    for method in continual.list_methods(recipe):
        method.check_export()
    model, chosen, _ = prepare_model(recipe, labels, device="cpu")
    set_model_state(model, state)
    state = techniques.expand_seed_sum(model, state)
    adapter = make_peft_adapter(model, chosen, recipe, state) if form != "model" else None
    if form == "adapter" and adapter is None:
        raise ModelError(
            f"{_join_names(chosen)} trains tensors that no PEFT adapter can contain; export with --format model"
        )
    with _create_folder(folder) as beside:
        if adapter is not None:
            save_peft_adapter(adapter, model, recipe, beside)
        else:
            save_whole_model(model, chosen, recipe, labels, beside)
        notes = describe_missing_tensors(recipe)
        notes += "" if adapter is None else describe_adapter_loading(recipe, labels)
        (beside / "README.md").write_text(card + notes, encoding="utf-8")
    return "model" if adapter is None else "adapter"


def describe_missing_tensors(recipe: Recipe) -> str:
    """Return a note about trained tensors that the export cannot contain, or an empty text."""
    algorithm = algorithms.find_algorithm(recipe)
    note = "" if algorithm is None else algorithm.describe_export()
    if any(technique.has_local_tensors() for technique in techniques.build_techniques(recipe.train.techniques)):
        note += (
            "The batch-norm layers have their values from before training, because each device keeps its own trained "
            "batch norms.\n"
        )
    return note


def _join_names(chosen: tuple[Technique, ...]) -> str:
    return "+".join(technique.name for technique in chosen)


@contextmanager
def _create_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside the new one. It gets the new name if the block succeeds."""
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
