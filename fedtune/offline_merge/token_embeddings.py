"""Embeddings and output layers of models with different tokens, read in the order of the result's tokens.

A row that a model lacks is taken from the base. If the base lacks it too, it is the mean of the models that have it. A
row that no model has is the mean of the model's own rows: zeros would outscore tokens with low scores.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.offline_merge.merge_config import TokenizerRule, TokenSource
from fedtune.offline_merge.readers.model_reader import ModelReader
from fedtune.offline_merge.readers.transposed_reader import Turned
from fedtune.offline_merge.token_tensor_names import is_of_columns, is_of_tokens, looks_like_tokens
from fedtune.offline_merge.vocabularies import join_tokenizers, read_vocabulary
from fedtune.wire.client_update import iter_row_chunks

__all__ = ["RemappedModels", "remap_token_rows"]


class RemappedModels(NamedTuple):
    """The models with the result's tokens, the one whose ids they keep, and a tokenizer.json if it is new."""

    models: list[ModelReader]
    leader: ModelReader
    described: dict[str, Any] | None


class _Known(NamedTuple):
    """A model, and for each token of the result its row in the model, or -1."""

    weights: ModelReader
    rows: Tensor


class _Given(NamedTuple):
    """Rows that a rule names: by row of the result the model and row to take, None for zeros; and whether always."""

    model: ModelReader | None
    row: int
    force: bool


def remap_token_rows(models: Sequence[ModelReader], base: ModelReader | None, rule: TokenizerRule) -> RemappedModels:
    """Return all models in the order of the tokens that the rule chooses. The base, if any, is one of them."""
    turned = {id(model): Turned(model) for model in models}
    models, base = [turned[id(model)] for model in models], None if base is None else turned[id(base)]
    for model in models:
        _check_known(model)
    words = [_vocabulary(model) for model in models]
    leader = _leader(models, base, rule)
    described = None
    if rule.source == "union":
        described = _grown(models, leader, words)
    ids = words[leader] if described is None else _ids_of(described)
    height = _height(models[leader], ids, grown=described is not None, multiple=rule.pad_to_multiple_of)
    known = [
        _Known(model, _places(ids, height, word, _embedding_rows(model), own=place == leader))
        for place, (model, word) in enumerate(zip(models, words, strict=True))
    ]
    given = dict(_given(rule, ids, models, words))
    order = sorted(known, key=lambda one: one.weights is not base)
    changed: list[ModelReader] = [Turned(_Retokenised(one, order, base is not None, height, given)) for one in known]
    return RemappedModels(changed, models[leader], described)


def _check_known(model: ModelReader) -> None:
    """Raise ModelError unless all token tensors are known, and have one row for each token."""
    rows = {form.num_rows for name, form in model.tensor_infos.items() if _is_of_tokens(name)}
    if len(rows) != 1:
        raise ModelError(
            f"{model.source} has embeddings of {' and '.join(map(str, sorted(rows))) or 'no known'} rows, which no "
            "tokenizer rule can put in order; leave the rule out"
        )
    for name, form in model.tensor_infos.items():
        if not is_of_columns(name) and looks_like_tokens(name, form.shape, *rows):
            raise ModelError(
                f"{model.source}: {name} seems to count tokens, in a way that fedtune does not know; leave the "
                "tokenizer rule out"
            )


def _is_of_tokens(name: str) -> bool:
    return is_of_tokens(name) or is_of_columns(name)


def _vocabulary(model: ModelReader) -> dict[str, int]:
    found = read_vocabulary(model.tokens)
    if found is None:
        raise ModelError(f"{model.source} has no tokenizer, which the tokenizer rule needs; leave the rule out")
    return found


def _leader(models: Sequence[ModelReader], base: ModelReader | None, rule: TokenizerRule) -> int:
    """Return the model whose tokens keep their ids."""
    if rule.source in ("union", "base"):
        return next((place for place, model in enumerate(models) if model is base), 0)
    return _named(models, rule.source)


def _named(models: Sequence[ModelReader], name: str) -> int:
    for place, model in enumerate(models):
        if model.source == name:
            return place
    raise ModelError(f"the tokenizer rule names {name!r}, which is none of the models; name one of them")


def _grown(models: Sequence[ModelReader], leader: int, words: Sequence[Mapping[str, int]]) -> dict[str, Any] | None:
    """Return a tokenizer of all tokens; None if the leader has them all."""
    if all(word.keys() <= words[leader].keys() for word in words):
        return None
    others = [model.tokens for place, model in enumerate(models) if place != leader]
    return join_tokenizers([models[leader].tokens, *others])


def _ids_of(described: Mapping[str, Any]) -> dict[str, int]:
    from tokenizers import Tokenizer as Tokens

    found: dict[str, int] = Tokens.from_str(json.dumps(described)).get_vocab(with_added_tokens=True)
    return found


def _embedding_rows(model: ModelReader) -> int:
    return max((form.num_rows for name, form in model.tensor_infos.items() if _is_of_tokens(name)), default=0)


def _height(model: ModelReader, ids: Mapping[str, int], *, grown: bool, multiple: int | None) -> int:
    """Return the number of rows of the result, rounded up if the rule says so."""
    height = max(_embedding_rows(model), max(ids.values()) + 1) if grown else _embedding_rows(model)
    return -(-height // multiple) * multiple if multiple else height


def _places(ids: Mapping[str, int], height: int, words: Mapping[str, int], rows: int, *, own: bool) -> Tensor:
    if own:  # its rows beyond its tokens are kept too
        places = torch.arange(height)
        places[rows:] = -1
        places[[place for token, place in ids.items() if token not in words]] = -1
        return places
    places = torch.full((height,), -1)
    for token, place in ids.items():
        if place < height and words.get(token, rows) < rows:
            places[place] = words[token]
    return places


def _given(
    rule: TokenizerRule, ids: Mapping[str, int], models: Sequence[ModelReader], words: Sequence[Mapping[str, int]]
) -> Iterator[tuple[int, _Given]]:
    for token, told in rule.tokens.items():
        if token not in ids:
            raise ModelError(f"the tokenizer rule has rows for {token!r}, which the result does not know; remove it")
        source = told.source
        if source is None:
            continue
        if isinstance(source, str):
            source = TokenSource(kind="model_token", model=source, token=token)
        if source.kind == "zero":
            yield ids[token], _Given(None, 0, told.force)
            continue
        place = _named(models, str(source.model))
        row = source.token_id if source.token is None else words[place].get(source.token)
        if row is None or row >= _embedding_rows(models[place]):
            raise ModelError(f"the tokenizer rule takes {source.token!r} from {source.model}, which does not know it")
        yield ids[token], _Given(models[place], row, told.force)


class _Retokenised(ModelReader):
    """A model whose token tensors are read in another order. ``order`` has the base first, if there is one."""

    def __init__(
        self, own: _Known, order: Sequence[_Known], based: bool, height: int, given: Mapping[int, _Given]
    ) -> None:
        weights = own.weights
        self.source, self.folder, self.files = weights.source, weights.folder, weights.files
        self.is_quantised, self.own_tokens = weights.is_quantised, weights.own_tokens
        self._means: dict[str, Tensor] = {}
        self._own, self._order, self._based, self._given = own, order, based, given
        self.tensor_infos = {
            name: form._replace(shape=(height, *form.shape[1:])) if _is_of_tokens(name) else form
            for name, form in weights.tensor_infos.items()
        }

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return the rows of the result's tokens."""
        if not _is_of_tokens(name):
            return self._own.weights.rows(name, start, stop)
        found = _gathered(self._own, name, start, stop)
        for row in self._special(start, stop):
            given = self._given.get(row)
            if given is None:
                found[row - start] = self._missing(name, row)
            elif given.model is None:
                found[row - start] = 0
            else:
                found[row - start] = given.model.rows(name, given.row, given.row + 1)[0]
        return found

    def _special(self, start: int, stop: int) -> list[int]:
        """Return the rows that do not come from the model itself."""
        lacking = (torch.nonzero(self._own.rows[start:stop] < 0).flatten() + start).tolist()
        forced = [row for row, given in self._given.items() if given.force and start <= row < stop]
        return sorted({*lacking, *forced})

    def _missing(self, name: str, row: int) -> Tensor:
        owners = [one for one in self._order if one.rows[row] >= 0 and name in one.weights.tensor_infos]
        if self._based and owners and owners[0] is self._order[0]:
            owners = owners[:1]
        if not owners:  # beyond all tokens
            return self._mean(name)
        return torch.stack([_row(one, name, int(one.rows[row])).double() for one in owners]).mean(0).to(torch.float32)

    def _mean(self, name: str) -> Tensor:
        """Return the mean of the model's own rows."""
        if name not in self._means:
            total, form = (
                torch.zeros(self.tensor_infos[name].shape[1:], dtype=torch.float64),
                self._own.weights.tensor_infos[name],
            )
            for start, stop in iter_row_chunks(form.shape):
                total += self._own.weights.rows(name, start, stop).double().sum(0)
            self._means[name] = (total / form.num_rows).to(torch.float32)
        return self._means[name]


def _row(one: _Known, name: str, row: int) -> Tensor:
    return one.weights.rows(name, row, row + 1)[0]


def _gathered(one: _Known, name: str, start: int, stop: int) -> Tensor:
    """Read a model's rows in the order of the result's tokens, with zeros for missing ones."""
    wanted = one.rows[start:stop]
    found = torch.zeros(stop - start, *one.weights.tensor_infos[name].shape[1:])
    breaks = torch.nonzero(wanted[1:] != wanted[:-1] + 1).flatten() + 1
    for run in torch.tensor_split(torch.arange(stop - start), breaks):
        first = int(wanted[run[0]])
        if first >= 0:
            found[run] = one.weights.rows(name, first, first + len(run))
    return found
