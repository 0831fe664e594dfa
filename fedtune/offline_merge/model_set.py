"""Open the models of a merge under common names: one spelling, tied tensors once, one vocabulary.

Models that cannot be merged are refused with the first tensor that differs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fedtune.errors import ModelError
from fedtune.offline_merge.compare_configs import check_settings
from fedtune.offline_merge.json_file import read_json
from fedtune.offline_merge.layer_names import parse_layer_name
from fedtune.offline_merge.merge_config import MergeConfig
from fedtune.offline_merge.optional_tensors import without_spare
from fedtune.offline_merge.readers.model_reader import ModelReader, are_same, match_tensor_names
from fedtune.offline_merge.readers.open_model import RunExporter, open_model, refuse_runs
from fedtune.offline_merge.safetensors_layout import TensorInfo
from fedtune.offline_merge.sentence_modules import unmerged_modules
from fedtune.offline_merge.token_embeddings import remap_token_rows
from fedtune.offline_merge.token_tensor_names import is_embedding, is_of_tokens, is_output
from fedtune.offline_merge.vocabularies import compare_vocabularies, has_same_tokenizer_file, read_vocabulary

__all__ = ["ModelSet", "check_forms", "check_precision", "open_models", "read_model_config"]


class ModelSet(NamedTuple):
    """The models by their names in the configuration, with the base if there is one.

    The result takes its tokenizer from ``tokenizer_folder`` and its special token ids from the config.json in
    ``numbered``. ``tokenizer_json`` is set if the tokenizer is new. ``tied``: input and output embeddings are one
    tensor.
    """

    by_name: Mapping[str, ModelReader]
    base: str | None
    tokenizer_folder: Path
    numbered: Path
    tokenizer_json: Mapping[str, Any] | None
    tied: bool
    warnings: Sequence[str]

    @property
    def first(self) -> ModelReader:
        """The base, or the first model if there is no base."""
        return self.by_name[self.base] if self.base is not None else next(iter(self.by_name.values()))

    @property
    def fine_tuned(self) -> Mapping[str, ModelReader]:
        """The models without the base."""
        return {name: model for name, model in self.by_name.items() if name != self.base}


def open_models(config: MergeConfig, runs: RunExporter = refuse_runs) -> ModelSet:
    """Open all models of a configuration; ModelError if they cannot be merged, SourceError if one cannot be read."""
    named = list(dict.fromkeys([*config.model_names, *([config.base_model] if config.base_model else [])]))
    opened = {name: open_model(name, runs) for name in named}
    _check_kinds(opened)
    _check_inputs(opened)
    reference = next(iter(opened.values()))
    alike = without_spare({name: match_tensor_names(model, reference.tensor_infos) for name, model in opened.items()})
    tied = all(_ties(model) for model in alike.values())
    outputs = [output for model in alike.values() for output in model.tensor_infos if is_output(output)]
    alike = {name: _UniformOutputEmbeddings(model, tied, outputs) for name, model in alike.items()}
    leader: ModelReader = next(iter(alike.values()))
    described: Mapping[str, Any] | None = None
    if config.base_model is not None:
        leader = alike[config.base_model]
    if config.tokenizer_rule is not None:
        base = None if config.base_model is None else alike[config.base_model]
        changed, leader, described = remap_token_rows(list(alike.values()), base, config.tokenizer_rule)
        alike = dict(zip(alike, changed, strict=True))
    else:
        _check_tokens(alike)
    _check_labels(alike, config.base_model)
    if config.models is not None:
        check_forms(alike, config.base_model)
    check_precision(alike, config)
    based = sorted(alike.items(), key=lambda item: item[0] != config.base_model)
    warnings = check_settings({name: model.folder for name, model in based})
    if unmerged := unmerged_modules(based[0][1].folder):
        warnings.append(
            f"{', '.join(unmerged)} of {based[0][1].source} is copied as it is: only transformers are merged"
        )
    return ModelSet(alike, config.base_model, leader.tokens, leader.folder, described, tied, warnings)


def read_model_config(model: ModelReader) -> dict[str, Any]:
    """A model's config.json."""
    return read_json(model.folder / "config.json")


class _UniformOutputEmbeddings(ModelReader):
    """A model with a separate output embedding if one of the models needs it, and without if all models tie it."""

    def __init__(self, model: ModelReader, tied: bool, outputs: Sequence[str]) -> None:
        self.source, self.folder, self.files = model.source, model.folder, model.files
        self.is_quantised, self.own_tokens, self._model = model.is_quantised, model.own_tokens, model
        self._same: dict[str, str] = {}
        self.tensor_infos = dict(model.tensor_infos)
        embedding = next((name for name in model.tensor_infos if is_embedding(name)), None)
        if embedding is None:
            return
        if tied:
            self.tensor_infos = {name: form for name, form in model.tensor_infos.items() if not is_output(name)}
        elif outputs and not any(is_output(name) for name in model.tensor_infos) and _ties(model):
            self._same[outputs[0]] = embedding
            self.tensor_infos[outputs[0]] = model.tensor_infos[embedding]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """The rows, of the input embeddings where the output's are the same."""
        return self._model.rows(self._same.get(name, name), start, stop)


def _ties(model: ModelReader) -> bool:
    """Whether the output embedding equals the input embedding. The tensors in the file decide, not config.json."""
    embedding = next((name for name in model.tensor_infos if is_embedding(name)), None)
    outputs = [name for name in model.tensor_infos if is_output(name)]
    if embedding is None or not read_model_config(model).get("tie_word_embeddings", not outputs):
        return False
    return all(are_same(model, embedding, output) for output in outputs)


def _check_kinds(models: Mapping[str, ModelReader]) -> None:
    kinds = {model.source: read_model_config(model).get("model_type") for model in models.values()}
    (one, kind), *others = kinds.items()
    for other, found in others:
        if found != kind:
            raise ModelError(f"{other} is a {found} model and {one} a {kind}; only models of one architecture merge")


def _check_inputs(models: Mapping[str, ModelReader]) -> None:
    """Raise ModelError if the file has only the output embedding, although the settings tie it to the input's."""
    for model in models.values():
        outputs = [form.shape for name, form in model.tensor_infos.items() if is_output(name)]
        others = [form.shape for name, form in model.tensor_infos.items() if not is_output(name)]
        if outputs and outputs[0] not in others and read_model_config(model).get("tie_word_embeddings"):
            raise ModelError(
                f"{model.source} holds its output's embeddings and not its input's, which they are tied to; load and "
                "save it with transformers"
            )


def _check_tokens(models: Mapping[str, ModelReader]) -> None:
    """Compare one vocabulary at a time, because each takes many megabytes. Most are the same file."""
    one, *others = models.values()
    for other in others:
        if has_same_tokenizer_file(one.tokens, other.tokens):
            continue
        first, found = read_vocabulary(one.tokens), read_vocabulary(other.tokens)
        if first is not None and found is not None and found != first:
            more, less, moved = compare_vocabularies(found, first)
            raise ModelError(
                f"{other.source} has {more} tokens that {one.source} lacks, lacks {less} and numbers {moved} "
                "differently; say whose tokens the result has, e.g. tokenizer_source: union"
            )


def _check_labels(models: Mapping[str, ModelReader], base: str | None) -> None:
    """Raise ModelError if heads have different labels. Heads are merged row by row, and each row is a class."""
    labels = {
        model.source: read_model_config(model).get("id2label")
        for name, model in models.items()
        if name != base and any(name.startswith(("classifier.", "score.")) for name in model.tensor_infos)
    }
    known = {origin: found for origin, found in labels.items() if found}
    for origin, found in known.items():
        first = next(iter(known))
        if found != known[first]:
            raise ModelError(
                f"{origin} tells {_listed(found)} apart, but {first} {_listed(known[first])}; only heads of the same "
                "labels merge"
            )


def _listed(labels: Mapping[str, str]) -> str:
    return ", ".join(map(str, labels.values()))


def check_forms(models: Mapping[str, ModelReader], base: str | None) -> None:
    """Raise ModelError unless all models have the same tensors in the same shapes. The base may lack a head."""
    (first, *others) = [model for name, model in models.items() if name != base] or list(models.values())
    for other in others:
        _check_names(first, other)
        _check_names(other, first)
    for model in [*others, *([models[base]] if base is not None else [])]:
        for name, form in first.tensor_infos.items():
            if name in model.tensor_infos and model.tensor_infos[name].shape != form.shape:
                raise ModelError(_other_shape(model, name, model.tensor_infos[name], first, form))
            if (
                name in model.tensor_infos
                and model.tensor_infos[name].dtype.is_floating_point != form.dtype.is_floating_point
            ):
                found, wanted = (str(one.tensor_infos[name].dtype).removeprefix("torch.") for one in (model, first))
                raise ModelError(
                    f"{name} is {found} in {model.source} and {wanted} in {first.source}; real numbers and integers do "
                    "not merge, take another release"
                )
    if base is not None:
        _check_names(first, models[base], layers_only=True)


def _check_names(one: ModelReader, other: ModelReader, *, layers_only: bool = False) -> None:
    for name in one.tensor_infos:
        if name not in other.tensor_infos and not (layers_only and parse_layer_name(name) is None):
            raise ModelError(
                f"{other.source} has no tensor {name}, which {one.source} has; only models of one architecture merge"
            )


def _other_shape(one: ModelReader, name: str, form: TensorInfo, other: ModelReader, wanted: TensorInfo) -> str:
    mend = "take another base or model"
    if is_of_tokens(name):
        mend = "say whose tokens the result has, e.g. tokenizer_source: union"
    return (
        f"the first tensor that differs is {name}: {list(form.shape)} in {one.source}, {list(wanted.shape)} in "
        f"{other.source}; {mend}"
    )


def check_precision(models: Mapping[str, ModelReader], config: MergeConfig) -> None:
    """Raise ModelError if models differ in data type and nobody said which the result has."""
    if config.dtype is not None or config.out_dtype is not None:
        return
    tuned: Sequence[ModelReader] = [
        model for name, model in models.items() if name != config.base_model and not model.is_quantised
    ]
    for model in tuned:
        if (found := _precision(model)) != (wanted := _precision(tuned[0])):
            raise ModelError(
                f"{model.source} is {found} and {tuned[0].source} {wanted}; say which the result has, e.g. "
                f"dtype: {wanted}"
            )


def _precision(model: ModelReader) -> str:
    """Return the data type of the largest tensor."""
    largest = max(model.tensor_infos.values(), key=lambda form: form.num_bytes)
    return str(largest.dtype).removeprefix("torch.")
