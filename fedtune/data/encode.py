"""Examples as tensors: tokenised or decoded once, so that a batch is a matter of indexing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fedtune.data.pixels import Images, pixels
from fedtune.data.table import Table
from fedtune.errors import ModelError
from fedtune.recipe.preprocessor_settings import Preprocessor
from fedtune.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EncodedDataset", "encode_examples"]

IGNORE_INDEX = -100


class EncodedDataset(Protocol):
    """Examples ready to be batched."""

    @property
    def domains(self) -> list[str] | None:
        """The domain of each example, where the data has any."""

    @property
    def lengths(self) -> Tensor | None:
        """Tokens of each example, where they differ."""

    def __len__(self) -> int: ...

    def make_batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The model's inputs for some examples, ``labels`` among them."""


def encode_examples(
    table: Table, recipe: Recipe, reader: "PreTrainedTokenizerBase | Preprocessor | None"
) -> EncodedDataset:
    """Tokenise texts, cut to ``train.max_length``; decode pictures as ``models.reader(recipe)`` reads them."""
    domains = list(table["domain"]) if "domain" in table.column_names else None
    labels = torch.tensor(table["label"][:]) if "label" in table.column_names else None
    if isinstance(reader, Preprocessor):
        assert labels is not None
        found, fitted = pixels(table, reader)
        return Images(found, reader, labels, domains, fitted)
    if reader is None:
        raise ModelError(f"{recipe.model.source} has no tokenizer, which {recipe.task} needs; choose another model")
    rows = _tokens(list(table["text"]), reader, recipe.train.max_length, ends=labels is None)
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), int(reader.pad_token_id), dtype=torch.int32)
    for padded, row in zip(ids, rows, strict=True):
        padded[: len(row)] = torch.tensor(row, dtype=torch.int32)
    return Texts(ids, lengths, labels, domains)


@dataclass(frozen=True)
class Texts:
    """Token ids [n, longest] padded on the right. Without labels a text is its own: causal language modelling."""

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
        labels = ids.masked_fill(~mask, IGNORE_INDEX) if self.labels is None else self.labels[rows]
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def _tokens(texts: list[str], tokenizer: "PreTrainedTokenizerBase", length: int, *, ends: bool) -> list[list[int]]:
    """Token ids of each text, one at least; with ``ends`` a text that is not cut carries the end token."""
    rows: list[list[int]] = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    last = tokenizer.eos_token_id if ends else None
    if ends and last is None:
        raise ModelError("the tokenizer has no end token, which causal language modelling needs; choose another model")
    if last is not None:
        rows = [[*row, int(last)][:length] for row in rows]
    return [row or [int(tokenizer.pad_token_id)] for row in rows]
