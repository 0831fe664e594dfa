"""Models and tokenizers loaded by transformers."""

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
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from fedtune.errors import FedtuneError, ModelError, SourceError
from fedtune.models.ends import end_texts
from fedtune.models.head_problem import check_head_problem
from fedtune.models.load_errors import explain_load_errors
from fedtune.models.model_task import ModelTask
from fedtune.models.new_head import warn_of_new_head
from fedtune.models.paging.source_tensors import SourceTensor, list_safetensors
from fedtune.models.position_interpolation import interpolate_positions, require_interpolation
from fedtune.models.preprocessor import FILE, check_known, from_settings
from fedtune.models.read_past import read_past
from fedtune.models.sources import find_gguf_file
from fedtune.models.transformers_logging import silence_transformers
from fedtune.recipe.preprocessor_settings import Preprocessor
from fedtune.recipe.schema import ModelSettings

__all__ = [
    "class_names",
    "load_pretrained_model",
    "load_pretrained_tokenizer",
    "make_pretrained_skeleton",
    "preprocessor",
    "save_config",
    "save_pretrained_model",
]


def load_pretrained_model(
    model: ModelSettings, location: str, task: ModelTask, labels: Sequence[str], *, seed: int, quantisation: Any | None
) -> PreTrainedModel:
    """Load the model at ``location``, a Hub id or a folder, as described in ``models.load``."""
    with explain_load_errors(model.source), silence_transformers(), torch.random.fork_rng(devices=[]):
        config = _prepare_config(model, location, task, labels)
        if quantisation is not None:
            _refuse_two_quantisations(model)
            quantisation.llm_int8_skip_modules = _head_layers(task, config)
        loaded, info = _loaded(model, location, task, config, seed, quantisation)
        if quantisation is not None and (drawn := _owners(info["missing_keys"])):
            quantisation.llm_int8_skip_modules += drawn  # drawn layers have nothing to quantise
            loaded, info = _loaded(model, location, task, config, seed, quantisation)
    _check_weights(model, task, loaded, info)
    require_interpolation(model, loaded)
    for _, found, wanted in sorted(info["mismatched_keys"])[:1]:
        warn_of_new_head(model.source, found[0], wanted[0])
    vars(loaded)["drawn"] = sorted(info["missing_keys"])
    if task.reads_text:
        _prepare_text_model(loaded, model, location, task)
    return loaded


def make_pretrained_skeleton(
    model: ModelSettings, location: str, task: ModelTask, labels: Sequence[str]
) -> tuple[PreTrainedModel, list[str]]:
    """Build the model at ``location`` from its configuration. Return it with the layers that are never quantised."""
    with explain_load_errors(model.source), silence_transformers(), torch.random.fork_rng(devices=[]):
        config = _prepare_config(model, location, task, labels)
        made: PreTrainedModel = _auto_class(task).from_config(config, dtype=getattr(torch, model.dtype))
    require_interpolation(model, made)
    if task.reads_text:
        _prepare_text_model(made, model, location, task)
    return made.eval(), _list_unquantised(made)


def _prepare_config(model: ModelSettings, location: str, task: ModelTask, labels: Sequence[str]) -> PretrainedConfig:
    """Return the configuration with the head of the task; ModelError if the model does not fit the task."""
    config: PretrainedConfig = AutoConfig.from_pretrained(location, trust_remote_code=False)
    _check_family(model, task, config)
    _check_head(model, task, config)
    interpolate_positions(model, config)
    for name, value in task.make_head_settings(labels).items():
        setattr(config, name, value)
    return config


def _loaded(
    model: ModelSettings, location: str, task: ModelTask, config: PretrainedConfig, seed: int, quantisation: Any | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the model and transformers' loading info. Missing weights are drawn from the seed."""
    torch.manual_seed(seed)
    if model.paged:
        return _load_paged(model, location, task, config)
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


def _load_paged(
    model: ModelSettings, location: str, task: ModelTask, config: PretrainedConfig
) -> tuple[PreTrainedModel, dict[str, Any]]:
    from fedtune.models.paging.load import load_paged_model
    from fedtune.models.paging.page_layers import PagedSource

    tensors = _list_tensors(model, location)
    auto, dtype = _auto_class(task), getattr(torch, model.dtype)
    source = PagedSource(model.source, location, tensors, model.paged)
    return load_paged_model(source, auto, config, dtype, has_new_head=task.has_new_head)


def _list_tensors(model: ModelSettings, location: str) -> dict[str, SourceTensor]:
    """Return the tensors of the model's files."""
    if (file := find_gguf_file(model.source)) is not None:
        from fedtune.models.paging.gguf_description import list_described_tensors

        return list_described_tensors(Path(location), file)
    single = cached_file(location, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    if single is not None:
        return list_safetensors([Path(single)])
    index = cached_file(location, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if index is None:
        raise SourceError(f"{model.source} has no {SAFE_WEIGHTS_NAME}; check model.source")
    return list_safetensors([Path(file) for file in get_checkpoint_shard_files(location, index)[0]])


def _refuse_two_quantisations(model: ModelSettings) -> None:
    if model.paged:
        raise ModelError("qlora quantises the base in memory, and model.paged leaves it in a file; take lora with nf4")


def _owners(drawn: Iterable[str]) -> list[str]:
    """Return the layers inside the backbone that hold drawn parameters."""
    return sorted({name.rpartition(".")[0] for name in drawn if ".pooler." in name})


def class_names(model: ModelSettings, location: str) -> tuple[str, ...]:
    """Return the class names in the order of the head; an empty tuple if the classes only have numbers."""
    with explain_load_errors(model.source), silence_transformers():
        config = AutoConfig.from_pretrained(location, trust_remote_code=False)
    named = dict(sorted((int(number), str(name)) for number, name in (config.id2label or {}).items()))
    numbered = all(name == f"LABEL_{number}" for number, name in named.items())
    return () if numbered else tuple(named.values())


def load_pretrained_tokenizer(model: ModelSettings, location: str) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer and make sure that it has a padding token."""
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
"""For a folder without a tokenizer, transformers makes one of special tokens and at most one other token."""


def preprocessor(model: ModelSettings, location: str) -> Preprocessor:
    """Return the image preprocessing in ``preprocessor_config.json``. Without that file, only the image size is used.

    Raises ModelError when the file's settings are not supported.
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
    """Return the default preprocessing at the image size of the configuration."""
    sides = {size} if isinstance(size, int) else set(size or ())
    return Preprocessor(side=sides.pop()) if len(sides) == 1 else Preprocessor()


def _auto_class(task: ModelTask) -> Any:
    return getattr(transformers, task.auto_class)


def _head_layers(task: ModelTask, config: PretrainedConfig) -> list[str]:
    """Return the layers that are not quantised.

    These are all layers outside the backbone, since transformers overlooks a new head with a bias, and layers whose
    weights are read directly.
    """
    with torch.device("meta"):
        skeleton = _auto_class(task).from_config(config)
    return _list_unquantised(skeleton)


def _list_unquantised(skeleton: PreTrainedModel) -> list[str]:
    behind = [name for name, _ in skeleton.named_children() if name != skeleton.base_model_prefix]
    return [*behind, *read_past(skeleton)]


def _check_family(model: ModelSettings, task: ModelTask, config: PretrainedConfig) -> None:
    if type(config) not in _auto_class(task)._model_mapping:
        raise ModelError(
            f"{model.source} is a {config.model_type} model, which does not do {task.name}; choose another"
        )


def _check_head(model: ModelSettings, task: ModelTask, config: PretrainedConfig) -> None:
    """Raise ModelError when the checkpoint's head was trained for another kind of label than the task's."""
    if task.has_new_head:
        check_head_problem(model.source, _find_problem_type(config), task)


def _find_problem_type(config: PretrainedConfig) -> str | None:
    """Return the problem type of a checkpoint's head, or None if its configuration does not name one."""
    declared = None if config.problem_type is None else str(config.problem_type)
    return "regression" if declared is None and config.num_labels == 1 else declared


def _check_weights(model: ModelSettings, task: ModelTask, loaded: PreTrainedModel, info: dict[str, Any]) -> None:
    """Raise ModelError when weights other than the head's are missing: the checkpoint does not fit the model class."""
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
    """Write a model of plain layers for ``from_pretrained``. Marks of an earlier quantisation are removed."""
    assert isinstance(model, PreTrainedModel)
    if getattr(model, "hf_quantizer", None) is not None:
        model.__dict__.update(hf_quantizer=None, is_quantized=False)
        del model.config.quantization_config
    with silence_transformers():
        model.save_pretrained(folder)


def save_config(model: nn.Module, folder: Path) -> None:
    """Write only a model's configuration, without its quantisation settings."""
    config: Any = copy(model.config)
    vars(config).pop("quantization_config", None)
    config.save_pretrained(folder)


def _prepare_text_model(loaded: PreTrainedModel, model: ModelSettings, location: str, task: ModelTask) -> None:
    """Switch off the key-value cache, and set the padding id of the model to the tokenizer's.

    A decoder with a classification head uses the padding id to find the last token of a padded text. The tokenizer pads
    the texts, so its id is used even if the configuration has another.
    """
    loaded.config.use_cache = False
    known = loaded.config.pad_token_id
    if known is not None and not task.has_new_head:
        return
    try:
        padding = load_pretrained_tokenizer(model, location).pad_token_id
    except FedtuneError:  # reported again when texts are encoded
        if known is None:
            raise
        return
    for config in (loaded.config, loaded.config.get_text_config()):
        config.pad_token_id = padding
