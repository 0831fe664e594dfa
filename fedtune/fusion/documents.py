"""What lies beside a merged model's tensors: config.json, the tokenizer, the index of the shards."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtune.fusion.config import MergeConfig, Source
from fedtune.fusion.folder import read_json
from fedtune.fusion.fuse import Merge
from fedtune.fusion.layers import stem
from fedtune.fusion.layout import Form
from fedtune.fusion.models import settings_of
from fedtune.fusion.token_rows import is_of_tokens
from fedtune.fusion.weights import Weights

__all__ = ["add_documents"]

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
)
_MODEL = ("generation_config.json", "preprocessor_config.json", "processor_config.json", "*.py")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HEADS = ("classifier.weight", "score.weight", "classifier.out_proj.weight")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


def add_documents(merge: Merge, folder: Path, shards: Mapping[str, Mapping[str, Form]]) -> None:
    """Write all but the tensors and the card."""
    model = _owner(merge)
    _write_json(folder / "config.json", _settings(merge, model))
    if len(shards) > 1:
        _write_json(folder / "model.safetensors.index.json", _index(shards))
    _copy(merge.models.tokens, folder, _TOKENIZER)
    _copy(model.folder, folder, _MODEL)
    if merge.models.described is not None:
        _write_json(folder / "tokenizer.json", merge.models.described)
    if (template := merge.chat_template()) is not None:
        _set_chat_template(folder, template)


def _owner(merge: Merge) -> Weights:
    """Whose config.json the result has: the base's, but a model's where this has a head that the base has not."""
    first = next(iter(merge.models.tuned.values()), merge.models.first)
    return merge.models.first if first.forms.keys() <= merge.models.first.forms.keys() else first


def _settings(merge: Merge, model: Weights) -> dict[str, Any]:
    settings = settings_of(model)
    settings.pop("quantization_config", None)
    forms = {target.name: target.form for target in merge.targets}
    largest = max(forms.values(), key=lambda form: form.bytes)
    settings["torch_dtype" if "torch_dtype" in settings else "dtype"] = str(largest.dtype).removeprefix("torch.")
    if settings.get("tie_word_embeddings", True) and any(name.endswith("lm_head.weight") for name in forms):
        settings["tie_word_embeddings"] = False
    if (rows := _token_rows(forms)) is not None and "vocab_size" in settings:
        settings["vocab_size"] = rows
    if merge.config.token_rule is not None:
        own = read_json(merge.models.tokens / "config.json")
        settings |= {key: own[key] for key in _TOKEN_IDS if key in own}
    if merge.config.slices is not None:
        _set_layers(settings, merge.config, model)
    _set_labels(settings, forms)
    return settings


def _token_rows(forms: Mapping[str, Form]) -> int | None:
    rows = [form.height for name, form in forms.items() if is_of_tokens(name)]
    return max(rows, default=None)


def _set_layers(settings: dict[str, Any], config: MergeConfig, model: Weights) -> None:
    """As many layers as the slices have, and the kind of each where the model has several."""
    firsts: list[Source] = [part.sources[0] for part in config.slices or []]
    numbers = [number for source in firsts for number in range(*source.layer_range)]
    for key in _LAYERS:
        if key in settings:
            settings[key] = len(numbers)
    kinds = settings.get("layer_types")
    if isinstance(kinds, list) and stem(model.forms) is not None and max(numbers) < len(kinds):
        settings["layer_types"] = [kinds[number] for number in numbers]


def _set_labels(settings: dict[str, Any], forms: Mapping[str, Form]) -> None:
    """An adapter brings a head without saying of how many labels."""
    heads = [form.height for name, form in forms.items() if name.endswith(_HEADS)]
    if heads and "id2label" not in settings and heads[0] != 2:
        settings["id2label"] = {str(number): f"LABEL_{number}" for number in range(heads[0])}
        settings["label2id"] = {label: int(number) for number, label in settings["id2label"].items()}


def _index(shards: Mapping[str, Mapping[str, Form]]) -> dict[str, Any]:
    total = sum(form.bytes for forms in shards.values() for form in forms.values())
    return {
        "metadata": {"total_size": total},
        "weight_map": {name: file for file, forms in shards.items() for name in forms},
    }


def _copy(source: Path, into: Path, names: tuple[str, ...]) -> None:
    for pattern in names:
        for file in sorted(source.glob(pattern)):
            shutil.copyfile(file, into / file.name)


def _set_chat_template(folder: Path, template: str) -> None:
    """In a file of its own, where it goes before one in the tokenizer's settings."""
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    if path.is_file():
        settings = read_json(path)
        settings.pop("chat_template", None)
        _write_json(path, settings)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
