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

from fedtune import data, models, techniques
from fedtune.errors import ModelError, StoreError
from fedtune.models.sources import resolve
from fedtune.recipe import Recipe
from fedtune.techniques import Technique
from fedtune.training import build_model, load_state

__all__ = ["Format", "export", "remark"]

Format = Literal["adapter", "full"]


def export(recipe: Recipe, state: Mapping[str, Tensor], folder: Path, form: Format | None, card: str) -> Format:
    """Write the model a state makes to a new folder and return its form; an adapter where PEFT can carry it.

    ``card`` becomes the folder's README, with the remark below it. Raises ModelError when an adapter is asked for that
    PEFT cannot carry, and StoreError when the folder exists already.
    """
    labels = data.load(recipe).labels
    model, chosen, _ = build_model(recipe, labels)
    load_state(model, state)
    adapter = _adapter(model, chosen, recipe) if form != "full" else None
    if form == "adapter" and adapter is None:
        raise ModelError(f"{_joined(chosen)} trains what no PEFT adapter can carry; export with --format full")
    with _new_folder(folder) as beside:
        if adapter is not None:
            _save_adapter(adapter, state, beside)
        else:
            _save_full(model, chosen, recipe, labels, beside)
        (beside / "README.md").write_text(card + remark(recipe), encoding="utf-8")
    return "full" if adapter is None else "adapter"


def remark(recipe: Recipe) -> str:
    """What must be known of a model that is not all that was learned; nothing of one that is."""
    if any(technique.keeps_own() for technique in techniques.choose(recipe.train.techniques)):
        return "Its batch norms are those of before training: each device keeps the ones it trained.\n"
    return ""


def _adapter(model: nn.Module, chosen: tuple[Technique, ...], recipe: Recipe) -> PeftConfig | None:
    """The adapter's configuration if it holds all that is trained, and plain transformers can load the base."""
    trains = [technique for technique in chosen if technique.trains]
    kept = all(technique.keeps_base() for technique in chosen)
    carried = len(trains) == 1 and kept and isinstance(model, PreTrainedModel)
    adapter = trains[0].adapter(model, recipe.task) if carried else None
    if adapter is not None:
        adapter.base_model_name_or_path = resolve(recipe.model.source)
    return adapter


def _save_adapter(adapter: PeftConfig, state: Mapping[str, Tensor], folder: Path) -> None:
    adapter.save_pretrained(folder)
    tensors = {f"base_model.model.{name.replace('.default.', '.')}": tensor for name, tensor in state.items()}
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")


def _save_full(
    model: nn.Module, chosen: tuple[Technique, ...], recipe: Recipe, labels: Sequence[str], folder: Path
) -> None:
    techniques.fold(chosen, model)
    models.save(model, labels, folder)
    if recipe.task != "image-classification":
        models.tokenizer(recipe.model).save_pretrained(folder)


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
