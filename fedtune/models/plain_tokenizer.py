"""A tokenizer that reads what transformers' tokenizer of a folder came to, with the library tokenizers alone.

A child process loads transformers' tokenizer once and writes its backend into the cache, under the digest of the files
that it was read from. Other classes than those of fast tokenizers with plain encoding are not written.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fedtune.files import hash_file
from fedtune.models.child_work import run_in_child
from fedtune.models.tokenizer_copy import BACKEND, COPIED, SETTINGS
from fedtune.paths import get_cache_folder
from fedtune.sample_packages import make_folder_once

__all__ = ["PlainTokenizer", "find_plain_tokenizer"]

_WEIGHTS = {".safetensors", ".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth"}


class PlainTokenizer:
    """Encodes lists of texts. All else is asked of transformers' tokenizer, which is then loaded."""

    pad_token_id: int
    eos_token_id: int | None
    unk_token_id: int | None
    all_special_ids: list[int]

    def __init__(self, folder: Path, source: Path) -> None:
        self._source = source
        self._backend = Tokenizer.from_file(str(folder / BACKEND))
        self._settings: dict[str, Any] = json.loads((folder / SETTINGS).read_bytes())
        for name in COPIED:
            setattr(self, name, self._settings[name])
        self._backend.encode_special_tokens = self._settings["split_special_tokens"]
        self._backend.no_padding()

    def __call__(self, texts: Any, pairs: Sequence[str] | None = None, **options: Any) -> Any:
        """Return the input_ids and token_type_ids of texts, or of pairs of texts."""
        if not isinstance(texts, list) or not texts or options.keys() - {"verbose"} != {"truncation", "max_length"}:
            return self.transformers_tokenizer(texts, pairs, **options)
        self._set_truncation(options["max_length"] if options["truncation"] else None)
        found = self._backend.encode_batch(texts if pairs is None else list(zip(texts, pairs, strict=True)))
        encoded = {"input_ids": [one.ids for one in found]}
        if "token_type_ids" in self._settings["model_input_names"]:
            encoded["token_type_ids"] = [one.type_ids for one in found]
        return encoded

    def _set_truncation(self, length: int | None) -> None:
        if length is None:
            self._backend.no_truncation()
            return
        self._backend.enable_truncation(
            length, stride=0, strategy="longest_first", direction=self._settings["truncation_side"]
        )

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Return the number of tokens that encoding adds to a text or to a pair."""
        return int(self._backend.num_special_tokens_to_add(pair))

    def __len__(self) -> int:
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def chat_template(self) -> Any:
        """The template of conversations."""
        return self.transformers_tokenizer.chat_template

    @chat_template.setter
    def chat_template(self, template: Any) -> None:
        self.transformers_tokenizer.chat_template = template

    @cached_property
    def transformers_tokenizer(self) -> Any:
        """Transformers' tokenizer."""
        from fedtune.models.pretrained import load_pretrained_tokenizer
        from fedtune.recipe.schema import ModelSettings

        return load_pretrained_tokenizer(ModelSettings(source=f"path:{self._source}"), str(self._source))

    def __getattr__(self, name: str) -> Any:
        """Ask transformers' tokenizer for what is not here."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.transformers_tokenizer, name)


def find_plain_tokenizer(source: Path) -> PlainTokenizer | None:
    """Return the tokenizer of a model's folder; None if only transformers can read it."""
    folder = get_cache_folder() / "tokenizers" / _digest(source)
    make_folder_once(folder, lambda beside: _fill(source, beside), "the tokenizer")
    return PlainTokenizer(folder, source) if (folder / SETTINGS).is_file() else None


def _fill(source: Path, beside: Path) -> None:
    run_in_child("write-tokenizer", str(source), beside)  # whoever finds an empty folder gets the error, if it is one


def _digest(source: Path) -> str:
    """The digest of all files of a folder but weights, and of the libraries that read them."""
    files = sorted(path for path in source.iterdir() if path.is_file() and path.suffix not in _WEIGHTS)
    told = [(path.name, hash_file(path)) for path in files if not path.name.startswith(".")]
    return hashlib.sha256(json.dumps([version("transformers"), version("tokenizers"), told]).encode()).hexdigest()
