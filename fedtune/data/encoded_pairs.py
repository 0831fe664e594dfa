"""Pairs of texts as token ids, each text encoded on its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedtune.data.encoded_texts import pad_rows
from fedtune.data.table import Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EncodedPairs", "encode_pairs"]


@dataclass(frozen=True)
class EncodedPairs:
    """Token ids [2 n, longest] padded on the right, all first texts before all second texts; ``labels`` [n]."""

    ids: Tensor
    text_lengths: Tensor
    labels: Tensor
    domains: list[str] | None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Tensor:
        """The number of tokens [n] of the longer text of each pair."""
        return self.text_lengths.reshape(2, -1).amax(0)

    def make_batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return input_ids and attention_mask [2 k, longest of the batch], first texts before second texts, and labels
        [k].
        """
        chosen = torch.as_tensor(indices)
        rows = torch.cat([chosen, chosen + len(self)])
        lengths = self.text_lengths[rows]
        ids = self.ids[rows, : int(lengths.max())].long()
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": self.labels[chosen]}


def encode_pairs(table: Table, tokenizer: "PreTrainedTokenizerBase", max_length: int, labels: Tensor) -> EncodedPairs:
    """Encode the columns ``text`` and ``text_pair``, each text truncated to ``max_length`` tokens."""
    texts = [*table["text"], *table["text_pair"]]
    padding = int(tokenizer.pad_token_id)
    rows = [row or [padding] for row in tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]]
    return EncodedPairs(pad_rows(rows, padding), torch.tensor([len(row) for row in rows]), labels, table.domains)
