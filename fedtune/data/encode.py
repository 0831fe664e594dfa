"""Examples as tensors: tokenised or decoded once, so that a batch is a matter of indexing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from datasets import Dataset, Image
from torch import Tensor
from torch.nn import functional as F

from fedtune.errors import DataError, ModelError
from fedtune.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoded", "encode"]

IGNORED = -100


class Encoded(Protocol):
    """Examples ready to be batched."""

    @property
    def domains(self) -> list[str] | None:
        """The domain of each example, where the data has any."""

    @property
    def lengths(self) -> Tensor | None:
        """Tokens of each example, where they differ."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The model's inputs for some examples, ``labels`` among them."""


def encode(dataset: Dataset, recipe: Recipe, tokenizer: "PreTrainedTokenizerBase | None") -> Encoded:
    """Tokenise texts, cut to ``train.length``; decode images, given out ``train.image`` pixels wide and high."""
    domains = list(dataset["domain"]) if "domain" in dataset.column_names else None
    labels = torch.tensor(dataset["label"][:]) if "label" in dataset.column_names else None
    if recipe.task == "image-classification":
        assert labels is not None
        return Images(_pixels(dataset, recipe.train.image), recipe.train.image, labels, domains)
    if tokenizer is None:
        raise ModelError(f"{recipe.model.source} has no tokenizer, which {recipe.task} needs; choose another model")
    rows = _tokens(list(dataset["text"]), tokenizer, recipe.train.length, ends=labels is None)
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), int(tokenizer.pad_token_id), dtype=torch.int32)
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

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """input_ids and attention_mask [k, longest of the batch]; labels [k], or [k, longest] with padding at -100."""
        rows = torch.as_tensor(indices)
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        ids = self.ids[rows, :longest].long()
        mask = torch.arange(longest) < lengths[:, None]
        labels = ids.masked_fill(~mask, IGNORED) if self.labels is None else self.labels[rows]
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


@dataclass(frozen=True)
class Images:
    """Pixels uint8 [n, 1 or 3, h, w]."""

    pixels: Tensor
    side: int
    labels: Tensor
    domains: list[str] | None
    lengths: None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """pixel_values float32 [k, 3, side, side], scaled as (pixel - 127) / 128; labels [k]."""
        rows = torch.as_tensor(indices)
        scaled = (_resize(self.pixels[rows].float(), self.side) - 127) / 128
        return {"pixel_values": scaled.expand(-1, 3, -1, -1), "labels": self.labels[rows]}


def _tokens(texts: list[str], tokenizer: "PreTrainedTokenizerBase", length: int, *, ends: bool) -> list[list[int]]:
    """Token ids of each text, one at least; with ``ends`` a text that is not cut carries the end token."""
    rows: list[list[int]] = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    last = tokenizer.eos_token_id if ends else None
    if ends and last is None:
        raise ModelError("the tokenizer has no end token, which causal language modelling needs; choose another model")
    if last is not None:
        rows = [[*row, int(last)][:length] for row in rows]
    return [row or [int(tokenizer.pad_token_id)] for row in rows]


def _pixels(dataset: Dataset, side: int) -> Tensor:
    """uint8 [n, c, h, w]: as they are when all have one size of at most ``side``, else scaled now."""
    if not isinstance(dataset.features["image"], Image):
        return _arrays(dataset).unsqueeze(1)
    try:
        decoded = [_channels_first(image) for image in dataset["image"]]
    except OSError as error:
        raise DataError(f"{error}; mend or remove the picture") from error
    [first, *others] = {image.shape for image in decoded}
    if others or max(first) > side:
        decoded = [_resize(image[None].float(), side)[0].round().byte() for image in decoded]
    return torch.stack(decoded)


def _arrays(dataset: Dataset) -> Tensor:
    """uint8 [n, h, w] of a column of arrays, taken from its buffer as it lies there."""
    column = dataset.select_columns("image").with_format("arrow")[:]["image"].combine_chunks()
    flat = column.storage.flatten().flatten().to_numpy()
    return torch.from_numpy(flat.reshape(len(dataset), *dataset.features["image"].shape).copy())


def _channels_first(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _resize(pixels: Tensor, side: int) -> Tensor:
    """float [n, c, h, w] -> [n, c, side, side]."""
    if pixels.shape[-2:] == (side, side):
        return pixels
    return F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
