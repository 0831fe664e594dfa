"""The models of a merge made comparable: one spelling of names, tied tensors once, one set of tokens.

What cannot be merged is refused here, with the first tensor that differs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fedtune.errors import ModelError
from fedtune.fusion.config import MergeConfig
from fedtune.fusion.json_file import read_json
from fedtune.fusion.layers import parse_layer_name
from fedtune.fusion.layout import TensorInfo
from fedtune.fusion.sentence_modules import unmerged_modules
from fedtune.fusion.settings_alike import check_settings
from fedtune.fusion.sources import RunExporter, open_model, refuse_runs
from fedtune.fusion.spare import without_spare
from fedtune.fusion.token_names import is_embedding, is_of_tokens, is_output
from fedtune.fusion.token_rows import remap_token_rows
from fedtune.fusion.vocabulary import compare_vocabularies, has_same_tokenizer_file, read_vocabulary
from fedtune.fusion.weights import ModelReader, are_same, match_tensor_names

__all__ = ["ModelSet", "open_models", "read_model_config"]


class ModelSet(NamedTuple):
    """Every model by the name the configuration has for it, the base among them where one is named.

    ``first`` is the one whose config.json the result has: the base, or else the first model. ``tokens`` is the folder
    whose tokenizer it has, ``numbered`` that of the config.json which has its special tokens' ids, ``described`` its
    tokenizer.json where that is new, ``tied`` whether input and output embeddings are one tensor.
    """

    by_name: Mapping[str, ModelReader]
    base: str | None
    tokens: Path
    numbered: Path
    described: Mapping[str, Any] | None
    tied: bool
    warnings: Sequence[str]

    @property
    def first(self) -> ModelReader:
        """The base, or else the first model."""
        return self.by_name[self.base] if self.base is not None else next(iter(self.by_name.values()))

    @property
    def tuned(self) -> Mapping[str, ModelReader]:
        """All but the base."""
        return {name: model for name, model in self.by_name.items() if name != self.base}


def open_models(config: MergeConfig, runs: RunExporter = refuse_runs) -> ModelSet:
    """Open all that a configuration names; ModelError when it cannot be merged, SourceError when one is unreadable."""
    named = list(dict.fromkeys([*config.sources, *([config.base_model] if config.base_model else [])]))
    opened = {name: open_model(name, runs) for name in named}
    _check_kinds(opened)
    _check_inputs(opened)
    reference = next(iter(opened.values()))
    alike = without_spare({name: match_tensor_names(model, reference.forms) for name, model in opened.items()})
    tied = all(_ties(model) for model in alike.values())
    outputs = [output for model in alike.values() for output in model.forms if is_output(output)]
    alike = {name: _UniformOutputEmbeddings(model, tied, outputs) for name, model in alike.items()}
    leader: ModelReader = next(iter(alike.values()))
    described: Mapping[str, Any] | None = None
    if config.base_model is not None:
        leader = alike[config.base_model]
    if config.token_rule is not None:
        base = None if config.base_model is None else alike[config.base_model]
        changed, leader, described = remap_token_rows(list(alike.values()), base, config.token_rule)
        alike = dict(zip(alike, changed, strict=True))
    else:
        _check_tokens(alike)
    _check_labels(alike, config.base_model)
    if config.models is not None:
        _check_forms(alike, config.base_model)
    _check_precision(alike, config)
    based = sorted(alike.items(), key=lambda item: item[0] != config.base_model)
    warnings = check_settings({name: model.folder for name, model in based})
    if unmerged := unmerged_modules(based[0][1].folder):
        warnings.append(
            f"{', '.join(unmerged)} of {based[0][1].origin} is copied as it is: only transformers are merged"
        )
    return ModelSet(alike, config.base_model, leader.tokens, leader.folder, described, tied, warnings)


def read_model_config(model: ModelReader) -> dict[str, Any]:
    """A model's config.json."""
    return read_json(model.folder / "config.json")


class _UniformOutputEmbeddings(ModelReader):
    """A model without its output embeddings where all models tie them to the input's, with them where one does not."""

    def __init__(self, model: ModelReader, tied: bool, outputs: Sequence[str]) -> None:
        self.origin, self.folder, self.files = model.origin, model.folder, model.files
        self.quantised, self.own_tokens, self._model = model.quantised, model.own_tokens, model
        self._same: dict[str, str] = {}
        self.forms = dict(model.forms)
        embedding = next((name for name in model.forms if is_embedding(name)), None)
        if embedding is None:
            return
        if tied:
            self.forms = {name: form for name, form in model.forms.items() if not is_output(name)}
        elif outputs and not any(is_output(name) for name in model.forms) and _ties(model):
            self._same[outputs[0]] = embedding
            self.forms[outputs[0]] = model.forms[embedding]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """The rows, of the input embeddings where the output's are the same."""
        return self._model.rows(self._same.get(name, name), start, stop)


def _ties(model: ModelReader) -> bool:
    """Whether the output's embeddings are the input's: not where a file has others, whatever its config.json says."""
    embedding = next((name for name in model.forms if is_embedding(name)), None)
    outputs = [name for name in model.forms if is_output(name)]
    if embedding is None or not read_model_config(model).get("tie_word_embeddings", not outputs):
        return False
    return all(are_same(model, embedding, output) for output in outputs)


def _check_kinds(models: Mapping[str, ModelReader]) -> None:
    kinds = {model.origin: read_model_config(model).get("model_type") for model in models.values()}
    (one, kind), *others = kinds.items()
    for other, found in others:
        if found != kind:
            raise ModelError(f"{other} is a {found} model and {one} a {kind}; only models of one architecture merge")


def _check_inputs(models: Mapping[str, ModelReader]) -> None:
    """ModelError for a model whose file has the output's tensor alone, though its settings say it is the input's."""
    for model in models.values():
        outputs = [form.shape for name, form in model.forms.items() if is_output(name)]
        others = [form.shape for name, form in model.forms.items() if not is_output(name)]
        if outputs and outputs[0] not in others and read_model_config(model).get("tie_word_embeddings"):
            raise ModelError(
                f"{model.origin} holds its output's embeddings and not its input's, which they are tied to; load and "
                "save it with transformers"
            )


def _check_tokens(models: Mapping[str, ModelReader]) -> None:
    """One after the other: a vocabulary takes many megabytes, and most are one file."""
    one, *others = models.values()
    for other in others:
        if has_same_tokenizer_file(one.tokens, other.tokens):
            continue
        first, found = read_vocabulary(one.tokens), read_vocabulary(other.tokens)
        if first is not None and found is not None and found != first:
            more, less, moved = compare_vocabularies(found, first)
            raise ModelError(
                f"{other.origin} has {more} tokens that {one.origin} lacks, lacks {less} and numbers {moved} "
                "differently; say whose tokens the result has, e.g. tokenizer_source: union"
            )


def _check_labels(models: Mapping[str, ModelReader], base: str | None) -> None:
    """Heads are merged row by row, so that each row must stand for the same class."""
    labels = {
        model.origin: read_model_config(model).get("id2label")
        for name, model in models.items()
        if name != base and any(name.startswith(("classifier.", "score.")) for name in model.forms)
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


def _check_forms(models: Mapping[str, ModelReader], base: str | None) -> None:
    """All tensors of the first model in all others, in the same shape; the base may lack a head."""
    (first, *others) = [model for name, model in models.items() if name != base] or list(models.values())
    for other in others:
        _check_names(first, other)
        _check_names(other, first)
    for model in [*others, *([models[base]] if base is not None else [])]:
        for name, form in first.forms.items():
            if name in model.forms and model.forms[name].shape != form.shape:
                raise ModelError(_other_shape(model, name, model.forms[name], first, form))
            if name in model.forms and model.forms[name].dtype.is_floating_point != form.dtype.is_floating_point:
                found, wanted = (str(one.forms[name].dtype).removeprefix("torch.") for one in (model, first))
                raise ModelError(
                    f"{name} is {found} in {model.origin} and {wanted} in {first.origin}; real numbers and integers do "
                    "not merge, take another release"
                )
    if base is not None:
        _check_names(first, models[base], layers_only=True)


def _check_names(one: ModelReader, other: ModelReader, *, layers_only: bool = False) -> None:
    for name in one.forms:
        if name not in other.forms and not (layers_only and parse_layer_name(name) is None):
            raise ModelError(
                f"{other.origin} has no tensor {name}, which {one.origin} has; only models of one architecture merge"
            )


def _other_shape(one: ModelReader, name: str, form: TensorInfo, other: ModelReader, wanted: TensorInfo) -> str:
    mend = "take another base or model"
    if is_of_tokens(name):
        mend = "say whose tokens the result has, e.g. tokenizer_source: union"
    return (
        f"the first tensor that differs is {name}: {list(form.shape)} in {one.origin}, {list(wanted.shape)} in "
        f"{other.origin}; {mend}"
    )


def _check_precision(models: Mapping[str, ModelReader], config: MergeConfig) -> None:
    if config.dtype is not None or config.out_dtype is not None:
        return
    tuned: Sequence[ModelReader] = [
        model for name, model in models.items() if name != config.base_model and not model.quantised
    ]
    for model in tuned:
        if (found := _precision(model)) != (wanted := _precision(tuned[0])):
            raise ModelError(
                f"{model.origin} is {found} and {tuned[0].origin} {wanted}; say which the result has, e.g. "
                f"dtype: {wanted}"
            )


def _precision(model: ModelReader) -> str:
    """The precision of the largest tensor."""
    largest = max(model.forms.values(), key=lambda form: form.bytes)
    return str(largest.dtype).removeprefix("torch.")
