"""Words with tags as tokens with labels: the first token of a word carries its tag."""

import warnings
from typing import TYPE_CHECKING

import torch

from fedtune.data.encoded_texts import IGNORED_LABEL, EncodedTexts, pad_rows
from fedtune.data.table import Table
from fedtune.errors import FedtuneWarning, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["encode_words"]


def encode_words(table: Table, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> EncodedTexts:
    """The columns ``words`` and ``tags`` (numbers) as at most ``max_length`` tokens with a label each.

    Further tokens of a word and special tokens have no label. Words beyond ``max_length`` are cut off, and a warning
    says how many. ModelError for a tokenizer that cannot tell which word a token belongs to.
    """
    if not tokenizer.is_fast:
        raise ModelError("the tokenizer cannot tell which word a token belongs to; choose a model with a fast one")
    words, tags = table["words"], table["tags"]
    found = tokenizer([list(row) for row in words], is_split_into_words=True, truncation=True, max_length=max_length)
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


def _label_tokens(words: list[int | None], tags: list[int], length: int) -> list[int]:
    """The tag of each token's word at the word's first token."""
    labels, last = [], None
    for word in words:
        labels.append(IGNORED_LABEL if word is None or word == last else tags[word])
        last = word
    return labels or [IGNORED_LABEL] * length
