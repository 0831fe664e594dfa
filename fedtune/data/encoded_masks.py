"""Texts for masked language modelling: every token but the special ones has a label."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedtune.data.encoded_texts import IGNORED_LABEL, EncodedTexts, pad_rows
from fedtune.data.table import Table
from fedtune.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EncodedMaskableTexts", "encode_maskable_texts"]


@dataclass(frozen=True)
class EncodedMaskableTexts(EncodedTexts):
    """Encoded texts and the id of the mask token."""

    mask_token: int = 0

    def make_batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the tensors of a batch of texts, and ``mask_token`` [k]."""
        return {**super().make_batch(indices), "mask_token": torch.full((len(indices),), self.mask_token)}


def encode_maskable_texts(table: Table, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> EncodedMaskableTexts:
    """Encode the column ``text``, truncated to ``max_length`` tokens.

    Raises ModelError for a tokenizer without a mask token.
    """
    if tokenizer.mask_token_id is None:
        raise ModelError("the tokenizer has no mask token, which fill-mask needs; choose an encoder such as BERT")
    found = tokenizer(list(table["text"]), truncation=True, max_length=max_length, return_special_tokens_mask=True)
    ids = [row or [int(tokenizer.pad_token_id)] for row in found["input_ids"]]
    labels = [
        [IGNORED_LABEL if special else token for token, special in zip(row, marks or [1], strict=True)]
        for row, marks in zip(ids, found["special_tokens_mask"], strict=True)
    ]
    return EncodedMaskableTexts(
        pad_rows(ids, int(tokenizer.pad_token_id)),
        torch.tensor([len(row) for row in ids]),
        pad_rows(labels, IGNORED_LABEL).long(),
        table.domains,
        labels_per_token=True,
        mask_token=int(tokenizer.mask_token_id),
    )
