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
    ids, labels = batch["input_ids"], batch["labels"]
    if labels.shape == ids.shape and ids.shape[0] == 1:
        return _split_runs(ids[0].tolist(), (labels[0] != IGNORED_LABEL).tolist(), tokenizer)
    rows = zip(ids, batch["attention_mask"].bool(), strict=True)
    texts = [Segment(tokenizer.decode(row[mask]), False) for row, mask in rows]
    return [*texts, Segment(_describe_labels(labels[0], tokenizer, names), True)]


def _split_runs(ids: list[int], targets: list[bool], tokenizer: Any) -> list[Segment]:
    """Neighbours that are all targets, or all not, together."""
    runs = groupby(zip(ids, targets, strict=True), key=lambda pair: pair[1])
    return [Segment(tokenizer.decode([token for token, _ in run]), target) for target, run in runs]


def _describe_labels(labels: Tensor, tokenizer: Any, names: Sequence[str]) -> str:
    if labels.dim() and not labels.is_floating_point():
        return str(tokenizer.decode(labels[labels != IGNORED_LABEL]))
    if labels.dim():
        return ", ".join(name for name, on in zip(names, labels.tolist(), strict=True) if on)
    value = labels.item()
    return names[int(value)] if names and labels.dtype == torch.int64 else str(value)
