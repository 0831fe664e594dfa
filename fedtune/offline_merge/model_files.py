"""The files beside a merged model's tensors: config.json, the tokenizer, the index of the shards."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtune.offline_merge.json_file import read_json
from fedtune.offline_merge.model_config import apply_slices, with_token_ids, with_vocabulary
from fedtune.offline_merge.model_set import read_model_config
from fedtune.offline_merge.readers.model_reader import ModelReader
from fedtune.offline_merge.run_merge import PreparedMerge
from fedtune.offline_merge.safetensors_layout import TensorInfo
from fedtune.offline_merge.sentence_modules import sentence_files
from fedtune.offline_merge.token_tensor_names import is_of_tokens, is_output
from fedtune.offline_merge.vocabularies import TOKENIZER

__all__ = ["write_model_files"]

_MODEL = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "*.py")
_GENERATION = "generation_config.json"
_HEADS = ("classifier.weight", "score.weight", "classifier.out_proj.weight")


def write_model_files(merge: PreparedMerge, folder: Path, shards: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    """Write everything except the tensors and the card."""
    model = _owner(merge)
    _write_json(folder / "config.json", _settings(merge, model))
    if len(shards) > 1:
        _write_json(folder / "model.safetensors.index.json", _index(shards))
    _copy(merge.models.tokenizer_folder, folder, TOKENIZER)
    _copy(model.folder, folder, _MODEL)
    for file in sentence_files(model.folder):
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(model.folder / file, folder / file)
    if (model.folder / _GENERATION).is_file():
        _write_json(folder / _GENERATION, _renumbered(merge, read_json(model.folder / _GENERATION), _GENERATION))
    if merge.models.tokenizer_json is not None:
        _write_json(folder / "tokenizer.json", merge.models.tokenizer_json)
    if (template := merge.chat_template()) is not None:
        _set_chat_template(folder, template)


def _owner(merge: PreparedMerge) -> ModelReader:
    """Return the model whose config.json is used: the base, or a model if it has a head that the base lacks."""
    first = next(iter(merge.models.fine_tuned.values()), merge.models.first)
    return merge.models.first if first.tensor_infos.keys() <= merge.models.first.tensor_infos.keys() else first


def _settings(merge: PreparedMerge, model: ModelReader) -> dict[str, Any]:
    settings = read_model_config(model)
    settings.pop("quantization_config", None)
    forms = {target.name: target.form for target in merge.output_tensors}
    largest = max(forms.values(), key=lambda form: form.num_bytes)
    settings["torch_dtype" if "torch_dtype" in settings else "dtype"] = str(largest.dtype).removeprefix("torch.")
    if any(is_output(name) for name in forms) and "scale_decoder_outputs" not in settings:
        settings["tie_word_embeddings"] = False  # T5 takes this for another setting, and never ties what differs
    if (rows := _token_rows(forms)) is not None:
        settings = with_vocabulary(settings, rows)
    settings = _renumbered(merge, settings, "config.json")
    if merge.config.slices is not None:
        settings = apply_slices(settings, merge.config.slices, merge.models)
    _set_labels(settings, forms)
    return settings


def _token_rows(forms: Mapping[str, TensorInfo]) -> int | None:
    rows = [form.num_rows for name, form in forms.items() if is_of_tokens(name)]
    return max(rows, default=None)


def _renumbered(merge: PreparedMerge, settings: dict[str, Any], file: str) -> dict[str, Any]:
    """Return the special token ids of the model whose tokenizer the rule chose."""
    return settings if merge.config.tokenizer_rule is None else with_token_ids(settings, merge.models, file)


def _set_labels(settings: dict[str, Any], forms: Mapping[str, TensorInfo]) -> None:
    """Set the number of labels of a head that comes from an adapter, which does not state it."""
    heads = [form.num_rows for name, form in forms.items() if name.endswith(_HEADS)]
    if heads and "id2label" not in settings and heads[0] != 2:
        settings["id2label"] = {str(number): f"LABEL_{number}" for number in range(heads[0])}
        settings["label2id"] = {label: int(number) for number, label in settings["id2label"].items()}


def _index(shards: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, Any]:
    total = sum(form.num_bytes for forms in shards.values() for form in forms.values())
    return {
        "metadata": {"total_size": total},
        "weight_map": {name: file for file, forms in shards.items() for name in forms},
    }


def _copy(source: Path, into: Path, names: tuple[str, ...]) -> None:
    for pattern in names:
        for file in sorted(source.glob(pattern)):
            shutil.copyfile(file, into / file.name)


def _set_chat_template(folder: Path, template: str) -> None:
    """Write the template to its own file, which takes precedence over the tokenizer's settings."""
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    if path.is_file():
        settings = read_json(path)
        settings.pop("chat_template", None)
        _write_json(path, settings)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
