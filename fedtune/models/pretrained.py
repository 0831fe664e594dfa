"""Models and tokenizers that transformers loads."""

from collections.abc import Iterable, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from fedtune.errors import FedtuneError, ModelError
from fedtune.models.ends import end_texts
from fedtune.models.load_errors import explain_load_errors
from fedtune.models.model_task import ModelTask
from fedtune.models.new_head import warn_of_new_head
from fedtune.models.position_interpolation import interpolate_positions, require_interpolation
from fedtune.models.preprocessor import FILE, check_known, from_settings
from fedtune.models.read_past import read_past
from fedtune.models.transformers_logging import silence_transformers
from fedtune.recipe.preprocessor_settings import Preprocessor
from fedtune.recipe.schema import ModelSettings

__all__ = [
    "class_names",
    "load_pretrained_model",
    "load_pretrained_tokenizer",
    "preprocessor",
    "save_config",
    "save_pretrained_model",
]


def load_pretrained_model(
    model: ModelSettings, location: str, task: ModelTask, labels: Sequence[str], *, seed: int, quantisation: Any | None
) -> PreTrainedModel:
    """The model at ``location``, a hub id or a folder, as ``models.load`` promises it."""
    with explain_load_errors(model.source), silence_transformers(), torch.random.fork_rng(devices=[]):
        config = AutoConfig.from_pretrained(location, trust_remote_code=False)
        _check_family(model, task, config)
        _check_head(model, task, config)
        interpolate_positions(model, config)
        for name, value in task.make_head_settings(labels).items():
            setattr(config, name, value)
        if quantisation is not None:
            quantisation.llm_int8_skip_modules = _head_layers(task, config)
        loaded, info = _loaded(model, location, task, config, seed, quantisation)
        if quantisation is not None and (drawn := _owners(info["missing_keys"])):
            quantisation.llm_int8_skip_modules += drawn  # there is nothing to quantise
            loaded, info = _loaded(model, location, task, config, seed, quantisation)
    _check_weights(model, task, loaded, info)
    require_interpolation(model, loaded)
    for _, found, wanted in sorted(info["mismatched_keys"])[:1]:
        warn_of_new_head(model.source, found[0], wanted[0])
    vars(loaded)["drawn"] = sorted(info["missing_keys"])
    if task.reads_text:
        _prepare_text_model(loaded, model, location, task)
    return loaded


def _loaded(
    model: ModelSettings, location: str, task: ModelTask, config: PretrainedConfig, seed: int, quantisation: Any | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what transformers found of its weights; what it did not find is drawn from the seed."""
    torch.manual_seed(seed)
    four_bits = {} if quantisation is None else {"quantization_config": quantisation, "device_map": "cpu"}
    found: tuple[PreTrainedModel, dict[str, Any]] = _auto_class(task).from_pretrained(
        location,
        config=config,
        dtype=getattr(torch, model.dtype),
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        trust_remote_code=False,
        use_safetensors=True,
        **four_bits,
    )
    return found


def _owners(drawn: Iterable[str]) -> list[str]:
    """The layers that hold drawn parameters inside the backbone."""
    return sorted({name.rpartition(".")[0] for name in drawn if ".pooler." in name})


def class_names(model: ModelSettings, location: str) -> tuple[str, ...]:
    """What the model calls its classes, in the order of its head; nothing where they are only numbered."""
    with explain_load_errors(model.source), silence_transformers():
        config = AutoConfig.from_pretrained(location, trust_remote_code=False)
    named = dict(sorted((int(number), str(name)) for number, name in (config.id2label or {}).items()))
    numbered = all(name == f"LABEL_{number}" for number, name in named.items())
    return () if numbered else tuple(named.values())


def load_pretrained_tokenizer(model: ModelSettings, location: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token."""
    with explain_load_errors(model.source), silence_transformers():
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
        config = AutoConfig.from_pretrained(location, trust_remote_code=False)
    if len(loaded.get_vocab().keys() - set(loaded.all_special_tokens)) < _FEWEST_WORDS:
        raise ModelError(
            f"{model.source} has a tokenizer that knows no words; put the tokenizer's files into the model's folder"
        )
    if loaded.pad_token is None:
        loaded.pad_token = loaded.eos_token
    if loaded.pad_token is None:
        raise ModelError(f"{model.source} has a tokenizer with neither padding nor end token; choose another model")
    if config.is_encoder_decoder:
        end_texts(loaded, model.source)
    return loaded


_FEWEST_WORDS = 2
"""transformers makes a tokenizer of special tokens, and at most one more, for a folder that has none."""


def preprocessor(model: ModelSettings, location: str) -> Preprocessor:
    """How the model reads pictures, by its ``preprocessor_config.json``; without one only its image size is known.

    Raises ModelError when its file cannot be followed.
    """
    with explain_load_errors(model.source), silence_transformers():
        if not _has(location, FILE):
            config = AutoConfig.from_pretrained(location, trust_remote_code=False)
            return _by_size(getattr(config, "image_size", None))
        found = AutoImageProcessor.from_pretrained(location, trust_remote_code=False)
    check_known(found, model.source)
    return from_settings(found.to_dict(), model.source)


def _has(location: str, file: str) -> bool:
    found = cached_file(location, file, _raise_exceptions_for_missing_entries=False)
    return found is not None


def _by_size(size: Any) -> Preprocessor:
    """The defaults, at the size of pictures that a configuration tells."""
    sides = {size} if isinstance(size, int) else set(size or ())
    return Preprocessor(side=sides.pop()) if len(sides) == 1 else Preprocessor()


def _auto_class(task: ModelTask) -> Any:
    return getattr(transformers, task.auto_class)


def _head_layers(task: ModelTask, config: PretrainedConfig) -> list[str]:
    """What is not quantised: what lies behind the backbone, where transformers overlooks a new head with a bias; and
    layers whose weights are read as they lie.
    """
    with torch.device("meta"):
        skeleton = _auto_class(task).from_config(config)
    behind = [name for name, _ in skeleton.named_children() if name != skeleton.base_model_prefix]
    return [*behind, *read_past(skeleton)]


def _check_family(model: ModelSettings, task: ModelTask, config: PretrainedConfig) -> None:
    if type(config) not in _auto_class(task)._model_mapping:
        raise ModelError(
            f"{model.source} is a {config.model_type} model, which does not do {task.name}; choose another"
        )


def _check_head(model: ModelSettings, task: ModelTask, config: PretrainedConfig) -> None:
    """A head for several labels at once, or for a number, would be trained as another than it is."""
    if not task.has_new_head:
        return
    made_for = _find_problem_type(config)
    if made_for not in (None, task.head_problem):
        raise ModelError(
            f"{model.source} is made for {_PROBLEMS[made_for]}, but {task.name} trains {_PROBLEMS[task.head_problem]}; "
            "choose another model, or take problem_type, id2label and label2id out of its config.json to give it a new "
            "head"
        )


def _find_problem_type(config: PretrainedConfig) -> str | None:
    """What the head of a checkpoint was trained for; None where its configuration does not say."""
    told = None if config.problem_type is None else str(config.problem_type)
    return "regression" if told is None and config.num_labels == 1 else told


_PROBLEMS = {
    "single_label_classification": "one class per example",
    "multi_label_classification": "several labels per example",
    "regression": "a number per example",
    None: "a class per token",
}


def _check_weights(model: ModelSettings, task: ModelTask, loaded: PreTrainedModel, info: dict[str, Any]) -> None:
    """Only a head may be new: a body without pretrained weights is the wrong class for this checkpoint."""
    labels = loaded.config.num_labels if task.has_new_head else 0
    drawn = [key for key in info["missing_keys"] if ".pooler." not in f".{key}"]
    wrong = [key for key in drawn if not labels or not _is_head(loaded, key)]
    wrong += [key for key, found, wanted in info["mismatched_keys"] if tuple(wanted) != (labels, *found[1:])]
    if wrong:
        raise ModelError(
            f"{model.source} has no weights for {min(wrong)!r}, which {type(loaded).__name__} needs for {task.name}; "
            "choose a model made for the task"
        )


def _is_head(loaded: PreTrainedModel, key: str) -> bool:
    prefix = loaded.base_model_prefix
    return ".pooler." in key or (prefix != "" and not key.startswith(f"{prefix}."))


def save_pretrained_model(model: nn.Module, folder: Path) -> None:
    """Write a model of plain layers for ``from_pretrained``, whatever it was quantised to before."""
    assert isinstance(model, PreTrainedModel)
    if getattr(model, "hf_quantizer", None) is not None:
        model.__dict__.update(hf_quantizer=None, is_quantized=False)
        del model.config.quantization_config
    with silence_transformers():
        model.save_pretrained(folder)


def save_config(model: nn.Module, folder: Path) -> None:
    """Write a model's configuration alone, without how it was quantised."""
    config: Any = copy(model.config)
    vars(config).pop("quantization_config", None)
    config.save_pretrained(folder)


def _prepare_text_model(loaded: PreTrainedModel, model: ModelSettings, location: str, task: ModelTask) -> None:
    """No key-value cache while training; a decoder finds the last word of a padded text by its padding id.

    That is the tokenizer's, which pads the texts, whatever the configuration says.
    """
    loaded.config.use_cache = False
    known = loaded.config.pad_token_id
    if known is not None and not task.has_new_head:
        return
    try:
        padding = load_pretrained_tokenizer(model, location).pad_token_id
    except FedtuneError:  # whoever encodes texts is told
        if known is None:
            raise
        return
    for config in (loaded.config, loaded.config.get_text_config()):
        config.pad_token_id = padding
