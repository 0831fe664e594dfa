"""One model's tensors, in whatever format, read a few rows at a time in fp32."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedtune.offline_merge.safetensors_layout import TensorInfo
from fedtune.wire.client_update import iter_row_chunks

__all__ = [
    "LazyStateDict",
    "ModelReader",
    "Prefixed",
    "are_same",
    "by_their_rest",
    "find_name_prefix",
    "match_tensor_names",
]

_WRAPPERS = ("model", "language_model")
"""Parts of a name that say only how modules are nested, which transformers has changed between memory and file."""


class ModelReader(ABC):
    """The tensors of a model.

    ``source`` is what the user called it. ``folder`` contains config.json, and ``tokens`` the tokenizer: the same
    folder, unless an adapter has its own. The tensors are read from ``files``; ``tensor_infos`` has their names in
    order. ``is_quantised``: they are stored in fewer bits.
    """

    source: str
    folder: Path
    own_tokens: Path | None = None
    files: tuple[Path, ...]
    tensor_infos: Mapping[str, TensorInfo]
    is_quantised: bool = False

    @property
    def tokens(self) -> Path:
        """The folder of the tokenizer."""
        return self.folder if self.own_tokens is None else self.own_tokens

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows ``start`` to ``stop`` in fp32; integers unchanged. A tensor without dimensions is one row."""

    def whole(self, name: str) -> Tensor:
        """Return all rows."""
        return self.rows(name, 0, self.tensor_infos[name].num_rows)


class Prefixed(ModelReader):
    """The same tensors under names with another prefix."""

    def __init__(self, weights: ModelReader, put: str, take: str = "") -> None:
        self._weights, self._put, self._take = weights, put, take
        self.source, self.folder, self.files = weights.source, weights.folder, weights.files
        self.is_quantised, self.own_tokens = weights.is_quantised, weights.own_tokens
        self._names = {put + name.removeprefix(take): name for name in weights.tensor_infos}
        self.tensor_infos = {name: weights.tensor_infos[own] for name, own in self._names.items()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """The rows of the tensor that has this name now."""
        return self._weights.rows(self._names[name], start, stop)


class LazyStateDict(Mapping[str, Tensor]):
    """Whole tensors by name. Each is read on every access and not cached."""

    def __init__(self, weights: ModelReader) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> Tensor:
        return self._weights.whole(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights.tensor_infos)

    def __len__(self) -> int:
        return len(self._weights.tensor_infos)


def are_same(model: ModelReader, one: str, other: str) -> bool:
    """Whether two tensors of a model are equal. They are compared in pieces up to the first difference."""
    form = model.tensor_infos[one]
    if form.shape != model.tensor_infos[other].shape:
        return False
    return all(torch.equal(model.rows(one, *at), model.rows(other, *at)) for at in iter_row_chunks(form.shape))


def find_name_prefix(wanted: Collection[str], known: Collection[str]) -> str:
    """Return the prefix with which most of the ``known`` names are ``wanted``; empty if no prefix is best.

    A fine-tune for a task may contain ``bert.encoder...`` where its base contains ``encoder...``.
    """
    names = set(wanted)
    firsts = Counter(name.split(".", 1)[0] + "." for name in wanted)
    candidates = ["", *firsts]
    return max(candidates, key=lambda prefix: sum(prefix + name in names for name in known))


def match_tensor_names(weights: ModelReader, names: Collection[str]) -> ModelReader:
    """Return the model under the names of another model of the same kind, if only a prefix differs."""
    if put := find_name_prefix(names, weights.tensor_infos):
        return Prefixed(weights, put)
    if take := find_name_prefix(weights.tensor_infos, names):
        return Prefixed(weights, "", take)
    return weights


def by_their_rest(names: Collection[str], known: Collection[str]) -> dict[str, str]:
    """Map names to ``known`` names that differ only in how modules are nested.

    A vision-language model is ``language_model.model.layers...`` in its file and ``model.language_model.layers...`` in
    memory, where adapters get their names.
    """
    found: dict[str, list[str]] = {}
    for name in known:
        found.setdefault(_rest(name), []).append(name)
    return {name: found[_rest(name)][0] for name in names if len(found.get(_rest(name), ())) == 1}


def _rest(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
