"""Encoded examples as text again, to see what a model reads and what of it is a target."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedtune.data.encoded_texts import IGNORED_LABEL

__all__ = ["Segment", "decode_example"]


class Segment(NamedTuple):
    """A part of an example; ``target`` says whether the model is trained to write or predict it."""

    text: str
    target: bool


def decode_example(batch: Mapping[str, Tensor], tokenizer: Any, names: Sequence[str]) -> list[Segment]:
    """The parts of the one example in a batch; labels that are no tokens follow the text, by their names if any."""
    rows = [ids[mask] for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)]
    labels = batch["labels"]
    if labels.shape == batch["input_ids"].shape:
        targets = [row[: len(ids)] != IGNORED_LABEL for row, ids in zip(labels, rows, strict=True)]
        return [part for pair in zip(rows, targets, strict=True) for part in _split_runs(*pair, tokenizer)]
    texts = [Segment(tokenizer.decode(row), False) for row in rows]
    return [*texts, Segment(_describe_labels(labels[0], tokenizer, names), True)]


def _split_runs(ids: Tensor, targets: Tensor, tokenizer: Any) -> list[Segment]:
    """Neighbours that are all targets, or all not, together."""
    runs = groupby(zip(ids.tolist(), targets.tolist(), strict=True), key=lambda pair: pair[1])
    return [Segment(tokenizer.decode([token for token, _ in run]), target) for target, run in runs]


def _describe_labels(labels: Tensor, tokenizer: Any, names: Sequence[str]) -> str:
    if labels.dim() and not labels.is_floating_point():
        return str(tokenizer.decode(labels[labels != IGNORED_LABEL]))
    if labels.dim():
        return ", ".join(name for name, on in zip(names, labels.tolist(), strict=True) if on)
    value = labels.item()
    return names[int(value)] if names and labels.dtype == torch.int64 else str(value)
