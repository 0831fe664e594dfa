"""Loads and saves fedtune's image models as folders of safetensors."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedtune.errors import ModelError, SourceError
from fedtune.models.classifier import ImageClassifier
from fedtune.models.head_problem import check_head_problem
from fedtune.models.kinds import IMAGE_MODEL_CLASSES
from fedtune.models.model_task import ModelTask
from fedtune.models.new_head import warn_of_new_head
from fedtune.models.preprocessor import FILE, from_settings
from fedtune.recipe.preprocessor_settings import Preprocessor
from fedtune.recipe.schema import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "is_fedtune_image_model",
    "load_image_model",
    "preprocessor",
    "save_image_model",
    "save_untrained_config",
    "wrap_for_transformers",
]

_MODEL_TYPE = "fedtune-image-classifier"
_INSIDE = "model."
"""The prefix of tensor names in folders saved by transformers."""
_UNTRAINED = "untrained"


def is_fedtune_image_model(location: str) -> bool:
    """Return whether a folder holds one of fedtune's image models. All others are loaded by transformers."""
    try:
        return bool(_config(Path(location))["model_type"] == _MODEL_TYPE)
    except (KeyError, OSError, TypeError, ValueError):
        return False


def refuse_four_bits(model: ModelSettings, folder: Path) -> None:
    """Raise ModelError: none of these models has a four-bit form."""
    raise ModelError(
        f"{model.source} is a model of kind {_config(folder)['kind']}, which has no four-bit form; take lora"
    )


def load_image_model(
    model: ModelSettings,
    folder: Path,
    task: ModelTask,
    labels: Sequence[str],
    *,
    seed: int,
    read_weights: bool = True,
) -> ImageClassifier:
    """Load the model in ``folder``. A head of another size and untrained weights are drawn from ``seed``.

    Raises ModelError and SourceError as ``models.load`` does.
    """
    config = _config(folder)
    kind: str = config["kind"]
    if task.auto_class != "AutoModelForImageClassification":
        raise ModelError(f"{model.source} is a model of kind {kind}, which does not do {task.name}; choose another")
    check_head_problem(model.source, config.get("problem_type"), task)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loaded = IMAGE_MODEL_CLASSES[kind](len(labels), **config["settings"])
    if read_weights and not config.get(_UNTRAINED, False):
        _fill(loaded, _tensors(folder, model.source), model.source)
    loaded.to(getattr(torch, model.dtype)).eval()
    return loaded


def preprocessor(folder: Path, source: str) -> Preprocessor:
    """Return the image preprocessing of the model in ``folder``; ModelError when its file cannot be used."""
    file = folder / FILE
    if not file.is_file():
        return Preprocessor()
    try:
        return from_settings(dict(json.loads(file.read_text(encoding="utf-8"))), source)
    except (OSError, TypeError, ValueError) as error:
        raise ModelError(f"{source}: its {FILE} is damaged; fetch it again") from error


def save_image_model(model: ImageClassifier, folder: Path) -> None:
    """Write config.json and the weights to a folder."""
    _write_config(folder, model.kind, model.settings)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def save_untrained_config(kind: str, settings: Mapping[str, Any], folder: Path) -> None:
    """Write a config.json for a model without weights. Each load draws all weights from its seed."""
    _write_config(folder, kind, settings, **{_UNTRAINED: True})


def wrap_for_transformers(
    model: ImageClassifier, labels: Sequence[str], problem: str | None = None
) -> "PreTrainedModel":
    """Return the same model as a transformers model, whose ``save_pretrained`` saves the code beside the weights.

    ``problem`` is the ``problem_type`` of its configuration.
    """
    from fedtune.models.in_transformers import FedtuneForImageClassification, FedtuneImageConfig

    numbers = {label: number for number, label in enumerate(labels)}
    names = {"id2label": dict(enumerate(labels)), "label2id": numbers}
    config = FedtuneImageConfig(model.kind, model.settings, **names, problem_type=problem)
    made: PreTrainedModel = FedtuneForImageClassification(config).eval()
    made.base_model.load_state_dict(model.state_dict())
    return made


def _write_config(folder: Path, kind: str, settings: Mapping[str, Any], **more: Any) -> None:
    config = {"model_type": _MODEL_TYPE, "kind": kind, "settings": dict(settings), **more}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def _tensors(folder: Path, source: str) -> dict[str, Tensor]:
    try:
        tensors = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise SourceError(f"cannot load {source}: a weight file is cut short or damaged; fetch it again") from error
    return {name.removeprefix(_INSIDE): tensor for name, tensor in tensors.items()}


def _fill(model: ImageClassifier, tensors: dict[str, Tensor], source: str) -> None:
    """Copy the weights into the model. A head of another shape keeps its drawn weights."""
    wanted = model.state_dict()
    fitting = {name: tensors[name] for name in wanted if name in tensors and tensors[name].shape == wanted[name].shape}
    wrong = [name for name in wanted if name not in fitting and not name.startswith(f"{model.head_name}.")]
    if wrong:
        raise ModelError(f"{source} has no weights for {min(wrong)!r}, which it needs; fetch it again")
    given_up = [name for name in sorted(wanted.keys() & tensors.keys() - fitting.keys()) if tensors[name].any()]
    for name in given_up[:1]:  # a head of zeros, as in sample:logistic, is untrained
        warn_of_new_head(source, len(tensors[name]), len(wanted[name]))
    model.load_state_dict(fitting, strict=False)
