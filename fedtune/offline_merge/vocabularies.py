"""Tokens and their ids: read a tokenizer, compare two, and join several."""

import filecmp
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Tokens

from fedtune.errors import ModelError, SourceError
from fedtune.offline_merge.json_file import read_json

__all__ = [
    "TOKENIZER",
    "compare_vocabularies",
    "has_same_tokenizer_file",
    "has_tokenizer",
    "join_tokenizers",
    "read_vocabulary",
]

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "source.spm",
    "target.spm",
    "bpe.codes",
    "tiktoken.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""The files of a tokenizer."""
_FILE = "tokenizer.json"
_OTHER = (
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "tiktoken.model",
    "tekken.json",
)
_ADDED = ("merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")
"""What adds tokens to those of an old format."""
Vocabulary = Mapping[str, int]


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder contains a tokenizer."""
    return any((folder / name).is_file() for name in (_FILE, *_OTHER))


def read_vocabulary(folder: Path) -> dict[str, int] | None:
    """Return the ids by token, with added tokens; None without a tokenizer."""
    if (folder / _FILE).is_file():
        return _of_file(folder / _FILE)
    return _of_old_format(folder) if has_tokenizer(folder) else None


def _of_file(file: Path) -> dict[str, int]:
    try:
        found: dict[str, int] = Tokens.from_file(str(file)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library has no narrower one
        raise SourceError(f"{file} cannot be read as a tokenizer ({error}); fetch it again") from error
    return found


def _of_old_format(folder: Path) -> dict[str, int]:
    """Read a tokenizer without tokenizer.json; ModelError if transformers cannot read it."""
    from transformers import AutoTokenizer  # seconds and a hundred megabytes

    try:
        return dict(AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab())
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"the tokenizer in {folder} cannot be read ({type(error).__name__}); save it with a {_FILE}"
        ) from error


def has_same_tokenizer_file(one: Path, other: Path) -> bool:
    """Whether two folders have byte-identical tokenizers, so that their vocabularies need not be read."""
    held, found = ([name for name in (_FILE, *_OTHER, *_ADDED) if (folder / name).is_file()] for folder in (one, other))
    if _FILE in held and _FILE in found:
        held = found = [_FILE]
    return bool(held) and held == found and all(filecmp.cmp(one / name, other / name, shallow=False) for name in held)


def compare_vocabularies(one: Vocabulary, other: Vocabulary) -> tuple[int, int, int]:
    """Count the tokens that only the first has, that only the second has, and that have another id."""
    common = one.keys() & other.keys()
    return len(one) - len(common), len(other) - len(common), sum(one[token] != other[token] for token in common)


def join_tokenizers(folders: Sequence[Path]) -> dict[str, Any]:
    """Return the first tokenizer.json with the tokens of the others appended.

    An added token stays an added token. A token of a model's vocabulary joins the vocabulary, with the merges that make
    it. Ids of the first tokenizer do not change.
    """
    first, *others = [_described(folder) for folder in folders]
    known = _ids(first)
    for other in others:
        new = [token for token, _ in sorted(_ids(other).items(), key=lambda item: item[1]) if token not in known]
        start = max(known.values(), default=-1) + 1
        numbers = {token: start + position for position, token in enumerate(new)}
        known |= numbers
        _add(first, other, numbers)
    return first


def _described(folder: Path) -> dict[str, Any]:
    if not (folder / _FILE).is_file():
        raise ModelError(f"{folder} has no {_FILE}, which a union of tokenizers needs; convert it or take another rule")
    return read_json(folder / _FILE)


def _ids(described: Mapping[str, Any]) -> dict[str, int]:
    found: dict[str, int] = Tokens.from_str(json.dumps(described)).get_vocab(with_added_tokens=True)
    return found


def _add(described: dict[str, Any], other: Mapping[str, Any], numbers: Mapping[str, int]) -> None:
    """Insert new tokens with their ids into a tokenizer, as they are in the other."""
    added = {entry["content"]: entry for entry in other.get("added_tokens", ())}
    words = described["model"].get("vocab")
    for token, number in numbers.items():
        if token in added or not isinstance(words, dict):
            described["added_tokens"].append(_entry(added.get(token), token, number))
        else:
            words[token] = number
    if "merges" in described["model"]:
        described["model"]["merges"] += _merges(described["model"], other["model"].get("merges", ()), numbers)


def _entry(entry: Mapping[str, Any] | None, token: str, number: int) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    return {**plain, **(entry or {}), "content": token, "id": number}


def _merges(model: Mapping[str, Any], merges: Iterable[Any], new: Mapping[str, int]) -> list[Any]:
    """Return the merges that make a new token from known parts."""
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]
    listed = bool(model["merges"]) and not isinstance(model["merges"][0], str)
    return [
        list(pair) if listed else " ".join(pair)
        for pair in pairs
        if "".join(pair) in new and all(part in model["vocab"] for part in pair)
    ]
