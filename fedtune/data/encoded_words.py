"""Tagged words as token ids and token labels. The first token of a word carries the word's tag."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fedtune.data.encoded_texts import IGNORED_LABEL, EncodedTexts, pad_rows
from fedtune.data.table import Table
from fedtune.errors import FedtuneWarning, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["encode_words"]

_SAMPLED_ROWS = 64


def encode_words(table: Table, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> EncodedTexts:
    """Encode the columns ``words`` and ``tags`` (numbers), truncated to ``max_length`` tokens, with one label per
    token.

    The other tokens of a word and special tokens have no label. Words beyond ``max_length`` are dropped, and a warning
    gives their number. Raises ModelError for a tokenizer that does not map tokens to words.
    """
    if not tokenizer.is_fast:
        raise ModelError("the tokenizer cannot tell which word a token belongs to; choose a model with a fast one")
    words, tags = _space_words(table["words"], tokenizer), table["tags"]
    found = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
    ids = [row or [int(tokenizer.pad_token_id)] for row in found["input_ids"]]
    labels = [_label_tokens(found.word_ids(row), tags[row], len(ids[row])) for row in range(len(ids))]
    lost = sum(map(len, words)) - sum(label != IGNORED_LABEL for row in labels for label in row)
    if lost:
        warnings.warn(
            f"{lost} of {sum(map(len, words))} words have no token, most of them beyond train.max_length {max_length}; "
            "they are neither trained nor scored",
            FedtuneWarning,
            stacklevel=2,
        )
    lengths = torch.tensor([len(row) for row in ids])
    return EncodedTexts(
        pad_rows(ids, int(tokenizer.pad_token_id)),
        lengths,
        pad_rows(labels, IGNORED_LABEL).long(),
        table.domains,
        labels_per_token=True,
    )


def _space_words(rows: Sequence[Sequence[str]], tokenizer: "PreTrainedTokenizerBase") -> list[list[str]]:
    """Return the words with or without a leading space, so that they get the same tokens as in running text.

    Byte-level tokenizers encode the space before a word. A word without it gets tokens that are rare in running text,
    so each word but the first needs a space. The function tokenises some rows both ways and keeps the way that agrees
    with the joined text more often.
    """
    plain = [list(row) for row in rows]
    spaced = [[row[0], *(f" {word}" for word in row[1:])] for row in rows]
    texts = tokenizer([" ".join(row) for row in plain[:_SAMPLED_ROWS]])["input_ids"]

    def count_equal(variant: list[list[str]]) -> int:
        found = tokenizer(variant[:_SAMPLED_ROWS], is_split_into_words=True)["input_ids"]
        return sum(one == text for one, text in zip(found, texts, strict=True))

    return spaced if count_equal(spaced) > count_equal(plain) else plain


def _label_tokens(words: list[int | None], tags: list[int], length: int) -> list[int]:
    """Return one label per token: the tag at the first token of a word, else the ignored label."""
    labels, last = [], None
    for word in words:
        labels.append(IGNORED_LABEL if word is None or word == last else tags[word])
        last = word
    return labels or [IGNORED_LABEL] * length
