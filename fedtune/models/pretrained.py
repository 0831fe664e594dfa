"""Models and tokenizers that transformers loads."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from fedtune.errors import ModelError, SourceError
from fedtune.models.preprocessor import FILE, from_settings
from fedtune.models.quiet import quiet
from fedtune.pictures import Preprocessor
from fedtune.recipe import Model, Task

__all__ = ["load", "preprocessor", "save", "tokenizer"]

_AUTO: dict[Task, Any] = {
    "causal-language-modelling": AutoModelForCausalLM,
    "image-classification": AutoModelForImageClassification,
    "sequence-classification": AutoModelForSequenceClassification,
}


def load(
    model: Model, location: str, task: Task, labels: Sequence[str], *, seed: int, quantisation: Any | None
) -> PreTrainedModel:
    """The model at ``location``, a hub id or a folder, as ``models.load`` promises it."""
    with _explained(model.source), quiet(), torch.random.fork_rng(devices=[]):
        config = AutoConfig.from_pretrained(location, trust_remote_code=False, **_head(labels))
        _check_family(model, task, config)
        settings = {}
        if quantisation is not None:
            quantisation.llm_int8_skip_modules = _head_layers(task, config)
            settings = {"quantization_config": quantisation, "device_map": "cpu"}
        torch.manual_seed(seed)
        loaded, info = _AUTO[task].from_pretrained(
            location,
            config=config,
            dtype=getattr(torch, model.dtype),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
            **settings,
        )
    _check_weights(model, task, loaded, info)
    if task != "image-classification":
        _prepare_text_model(loaded, model, location)
    return loaded  # type: ignore[no-any-return]


def tokenizer(model: Model, location: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token."""
    with _explained(model.source), quiet():
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
    if loaded.pad_token is None:
        loaded.pad_token = loaded.eos_token
    if loaded.pad_token is None:
        raise ModelError(f"{model.source} has a tokenizer with neither padding nor end token; choose another model")
    return loaded


def preprocessor(model: Model, location: str) -> Preprocessor:
    """How the model reads pictures, by its ``preprocessor_config.json``; without one only its image size is known.

    Raises ModelError when its file cannot be followed.
    """
    with _explained(model.source), quiet():
        if not _has(location, FILE):
            config = AutoConfig.from_pretrained(location, trust_remote_code=False)
            return _by_size(getattr(config, "image_size", None))
        found = AutoImageProcessor.from_pretrained(location, trust_remote_code=False)
    return from_settings(found.to_dict(), model.source)


def _has(location: str, file: str) -> bool:
    found = cached_file(location, file, _raise_exceptions_for_missing_entries=False)
    return found is not None


def _by_size(size: Any) -> Preprocessor:
    """The defaults, at the size of pictures that a configuration tells."""
    sides = {size} if isinstance(size, int) else set(size or ())
    return Preprocessor(side=sides.pop()) if len(sides) == 1 else Preprocessor()


def _head(labels: Sequence[str]) -> dict[str, Any]:
    if not labels:
        return {}
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": "single_label_classification",
    }


def _head_layers(task: Task, config: PretrainedConfig) -> list[str]:
    """What lies behind the backbone and is not quantised: transformers itself overlooks a new head with a bias."""
    with torch.device("meta"):
        skeleton = _AUTO[task].from_config(config)
    return [name for name, _ in skeleton.named_children() if name != skeleton.base_model_prefix]


def _check_family(model: Model, task: Task, config: PretrainedConfig) -> None:
    if type(config) not in _AUTO[task]._model_mapping:
        raise ModelError(f"{model.source} is a {config.model_type} model, which does not do {task}; choose another")


def _check_weights(model: Model, task: Task, loaded: PreTrainedModel, info: dict[str, Any]) -> None:
    """Only a head may be new: a body without pretrained weights is the wrong class for this checkpoint."""
    labels = 0 if task == "causal-language-modelling" else loaded.config.num_labels
    wrong = [key for key in info["missing_keys"] if not labels or not _is_head(loaded, key)]
    wrong += [key for key, found, wanted in info["mismatched_keys"] if tuple(wanted) != (labels, *found[1:])]
    if wrong:
        raise ModelError(
            f"{model.source} has no weights for {min(wrong)!r}, which {type(loaded).__name__} needs for {task}; "
            "choose a model made for the task"
        )


def _is_head(loaded: PreTrainedModel, key: str) -> bool:
    prefix = loaded.base_model_prefix
    return ".pooler." in key or (prefix != "" and not key.startswith(f"{prefix}."))


def save(model: nn.Module, folder: Path) -> None:
    """Write a model of plain layers for ``from_pretrained``, whatever it was quantised to before."""
    assert isinstance(model, PreTrainedModel)
    if getattr(model, "hf_quantizer", None) is not None:
        model.__dict__.update(hf_quantizer=None, is_quantized=False)
        del model.config.quantization_config
    with quiet():
        model.save_pretrained(folder)


def _prepare_text_model(loaded: PreTrainedModel, model: Model, location: str) -> None:
    """No key-value cache while training; a decoder finds the last word of a padded text by its padding id."""
    loaded.config.use_cache = False
    if loaded.config.pad_token_id is None:
        loaded.config.pad_token_id = tokenizer(model, location).pad_token_id


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turn what transformers raises for a source it cannot load into one sentence."""
    try:
        yield
    except (ImportError, OSError, SafetensorError, ValueError) as error:
        raise SourceError(f"cannot load {source}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What went wrong and the mend, by the first error of the chain that says it."""
    chain: list[BaseException] = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and before not in chain:
        chain.append(before)
    kinds = {kind.__name__ for item in chain for kind in type(item).__mro__}
    for kind, reason in _REASONS.items():
        if kind in kinds:
            return reason
    return " ".join(str(error).split("\n")[0].split()).rstrip(".:")


_REASONS = {
    "GatedRepoError": "it is gated; ask for access on its page and log in with `hf auth login`",
    "RepositoryNotFoundError": "the hub has no such model, or it is private; check the id",
    "RevisionNotFoundError": "the hub has no such revision; check the id",
    "LocalEntryNotFoundError": "the hub cannot be reached and the cache does not have it; check the network",
    "OfflineModeIsEnabled": "the hub is switched off by HF_HUB_OFFLINE and the cache does not have it; go online",
    "ConnectError": "the hub cannot be reached; check the network",
    "SafetensorError": "a weight file is cut short or damaged; fetch it again",
}
