"""Texts as token ids. They are tokenised once and padded per batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedtune.data.table import Table
from fedtune.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED_LABEL", "EncodedTexts", "encode_texts", "pad_rows", "split_rows"]

IGNORED_LABEL = -100
"""The label of a position that is not predicted; torch's cross entropy ignores it."""


@dataclass(frozen=True)
class EncodedTexts:
    """Token ids [n, longest] padded on the right.

    ``labels`` are [n], [n, classes] or, with ``labels_per_token``, [n, longest]. Without labels, the tokens are the
    labels. ``segments`` [n, longest] are the token type ids of pairs of texts. ``owners`` [m], in rising order, are
    the texts that the last m rows continue: further pieces of long texts, which are no examples of their own.
    """

    ids: Tensor
    lengths: Tensor
    labels: Tensor | None
    domains: list[str] | None
    segments: Tensor | None = None
    labels_per_token: bool = False
    owners: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids) - (0 if self.owners is None else len(self.owners))

    def make_batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return input_ids and attention_mask [k, longest of the batch], and labels.

        Token labels are padded with -100.
        """
        rows = torch.as_tensor(indices)
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        ids = self.ids[rows, :longest].long()
        mask = torch.arange(longest) < lengths[:, None]
        batch = {"input_ids": ids, "attention_mask": mask.long()}
        if self.segments is not None:
            batch["token_type_ids"] = self.segments[rows, :longest].long()
        return {**batch, "labels": self._labels(rows, ids, mask)}

    def _labels(self, rows: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        if self.labels is None:
            return ids.masked_fill(~mask, IGNORED_LABEL)
        return self.labels[rows, : ids.shape[1]] if self.labels_per_token else self.labels[rows]


def encode_texts(
    table: Table,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    labels: Tensor | None = None,
    *,
    splits: bool = False,
) -> EncodedTexts:
    """Encode the column ``text``, followed by ``text_pair`` if there is one, truncated to ``max_length`` tokens.

    Without labels, the end token is appended to a text that is not truncated. With ``splits``, which is for texts
    without labels, what would be truncated follows in further pieces. Raises ModelError when the tokenizer has no end
    token, or puts no separator between the texts of a pair.
    """
    pairs = list(table["text_pair"]) if "text_pair" in table.column_names else None
    if pairs is not None and tokenizer.num_special_tokens_to_add(pair=True) == tokenizer.num_special_tokens_to_add(
        pair=False
    ):
        raise ModelError(
            "the tokenizer puts nothing between the two texts of a pair; write both into one column, or choose an "
            "encoder such as BERT"
        )
    found = tokenizer(
        list(table["text"]), pairs, truncation=not splits, max_length=None if splits else max_length, verbose=False
    )
    rows = _end_texts(found["input_ids"], tokenizer, ends=labels is None)
    told = found.get("token_type_ids") if pairs is not None else None
    segments = None if told is None else pad_rows([row or [0] for row in told], 0)
    pieces, owners = split_rows(rows, max_length) if splits else ([row[:max_length] for row in rows], None)
    lengths = torch.tensor([len(row) for row in pieces])
    padded = pad_rows(pieces, int(tokenizer.pad_token_id))
    return EncodedTexts(padded, lengths, labels, table.domains, segments, owners=owners)


def split_rows(rows: Sequence[list[int]], length: int) -> tuple[list[list[int]], Tensor]:
    """Return the first ``length`` tokens of each row, then all further pieces, and the row that each of those is of."""
    further = [
        (number, row[at : at + length]) for number, row in enumerate(rows) for at in range(length, len(row), length)
    ]
    first = [row[:length] for row in rows]
    return [*first, *(piece for _, piece in further)], torch.tensor(
        [number for number, _ in further], dtype=torch.int64
    )


def pad_rows(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Return int32 [n, longest]: the rows padded with ``fill`` on the right."""
    padded = torch.full((len(rows), max(len(row) for row in rows)), fill, dtype=torch.int32)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = torch.tensor(row, dtype=torch.int32)
    return padded


def _end_texts(rows: list[list[int]], tokenizer: "PreTrainedTokenizerBase", *, ends: bool) -> list[list[int]]:
    """Append the end token if ``ends``, and give an empty row one padding token."""
    last = tokenizer.eos_token_id if ends else None
    if ends and last is None:
        raise ModelError("the tokenizer has no end token, which text generation needs; choose another model")
    if last is not None:
        rows = [[*row, int(last)] for row in rows]
    return [row or [int(tokenizer.pad_token_id)] for row in rows]
