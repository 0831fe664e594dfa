"""Texts and their target texts as token ids, for encoder-decoder models."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedtune.data.encoded_texts import IGNORED_LABEL, pad_rows
from fedtune.data.table import Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EncodedTargets", "encode_targets"]


@dataclass(frozen=True)
class EncodedTargets:
    """Token ids of texts [n, longest] and of targets [n, longest target], padded on the right."""

    ids: Tensor
    lengths: Tensor
    targets: Tensor
    target_lengths: Tensor
    domains: list[str] | None

    def __len__(self) -> int:
        return len(self.ids)

    def make_batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return input_ids and attention_mask [k, longest text], and labels [k, longest target] padded with -100."""
        rows = torch.as_tensor(indices)
        lengths, targets = self.lengths[rows], self.target_lengths[rows]
        ids = self.ids[rows, : int(lengths.max())].long()
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        labels = self.targets[rows, : int(targets.max())].long()
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def encode_targets(table: Table, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> EncodedTargets:
    """Encode the columns ``text`` and ``target``, each truncated to ``max_length`` tokens."""
    padding = int(tokenizer.pad_token_id)
    ids = tokenizer(list(table["text"]), truncation=True, max_length=max_length)["input_ids"]
    targets = tokenizer(text_target=list(table["target"]), truncation=True, max_length=max_length)["input_ids"]
    ids, targets = ([row or [padding] for row in rows] for rows in (ids, targets))
    return EncodedTargets(
        pad_rows(ids, padding),
        torch.tensor([len(row) for row in ids]),
        pad_rows(targets, IGNORED_LABEL),
        torch.tensor([len(row) for row in targets]),
        table.domains,
    )
