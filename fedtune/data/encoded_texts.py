"""Texts as token ids: tokenised once, padded in each batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedtune.data.table import Table
from fedtune.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED_LABEL", "EncodedTexts", "encode_texts"]

IGNORED_LABEL = -100
"""The label of a place that is not predicted, as in torch's cross entropy."""


@dataclass(frozen=True)
class EncodedTexts:
    """Token ids [n, longest] padded on the right. Without ``labels`` the tokens are the labels: text generation."""

    ids: Tensor
    lengths: Tensor
    labels: Tensor | None
    domains: list[str] | None

    def __len__(self) -> int:
        return len(self.ids)

    def make_batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """input_ids and attention_mask [k, longest of the batch]; labels [k], or [k, longest] with padding at -100."""
        rows = torch.as_tensor(indices)
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        ids = self.ids[rows, :longest].long()
        mask = torch.arange(longest) < lengths[:, None]
        labels = ids.masked_fill(~mask, IGNORED_LABEL) if self.labels is None else self.labels[rows]
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def encode_texts(table: Table, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> EncodedTexts:
    """The column ``text`` as at most ``max_length`` tokens, with the class numbers of ``label`` where there are any.

    Without labels a text that is not cut ends in the end token; ModelError when the tokenizer has none.
    """
    labels = torch.tensor(table["label"][:]) if "label" in table.column_names else None
    rows = _tokenise(list(table["text"]), tokenizer, max_length, ends=labels is None)
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), int(tokenizer.pad_token_id), dtype=torch.int32)
    for padded, row in zip(ids, rows, strict=True):
        padded[: len(row)] = torch.tensor(row, dtype=torch.int32)
    return EncodedTexts(ids, lengths, labels, table.domains)


def _tokenise(texts: list[str], tokenizer: "PreTrainedTokenizerBase", length: int, *, ends: bool) -> list[list[int]]:
    """Token ids of each text, one at least; with ``ends`` a text that is not cut carries the end token."""
    rows: list[list[int]] = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    last = tokenizer.eos_token_id if ends else None
    if ends and last is None:
        raise ModelError("the tokenizer has no end token, which text generation needs; choose another model")
    if last is not None:
        rows = [[*row, int(last)][:length] for row in rows]
    return [row or [int(tokenizer.pad_token_id)] for row in rows]
