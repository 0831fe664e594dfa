"""Examples in the form that a device stores them in: the bytes of pixels, tokens or samples, and the label.

Each example is a byte string, the same on every machine and whatever examples are around it. Integers take as few bytes
as their values need; the float tensors that a model reads are never stored where their source is known.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtune.data import EncodedDataset
from fedtune.data.encoded_audio import EncodedAudio, EncodedSpectrograms
from fedtune.data.encoded_pairs import EncodedPairs
from fedtune.data.encoded_preferences import EncodedPreferences
from fedtune.data.encoded_targets import EncodedTargets
from fedtune.data.encoded_texts import IGNORED_LABEL, EncodedTexts, pad_rows
from fedtune.data.pixels import EncodedPictures
from fedtune.data.token_files import StoredTexts
from fedtune.errors import DataError

__all__ = ["has_equal_sizes", "pack_examples", "unpack_examples"]

Field: TypeAlias = NDArray[Any]
_TYPES = ("|u1", "<i2", "<u2", "<i4", "<i8", "<f4", "<f8")
"""The types of a field, the smallest first. Their order is part of the format."""
_INTEGERS = _TYPES[:5]
_HEAD = 5
"""Bytes in front of a field: its type and its number of values."""


class _Kind(NamedTuple):
    """How the examples of one class are stored: the fields of a row, and the examples made of the fields of rows."""

    list_fields: Callable[[Any, int], list[Tensor]]
    restore: Callable[[Any, list[list[Field]], int], EncodedDataset]


def pack_examples(examples: EncodedDataset, rows: Sequence[int]) -> list[bytes]:
    """Return the stored form of rows; DataError for a kind of examples that has none."""
    list_fields = _find_kind(examples).list_fields
    return [b"".join(_pack_field(field.numpy()) for field in list_fields(examples, row)) for row in rows]


def unpack_examples(template: EncodedDataset, contents: Sequence[bytes], padding: int) -> EncodedDataset:
    """Return stored rows as examples of the same kind and settings as ``template``.

    ``padding`` is the model's padding token. Raises DataError for rows that another kind of examples was stored as.
    """
    try:
        return _find_kind(template).restore(template, [_unpack_fields(content) for content in contents], padding)
    except (IndexError, ValueError, TypeError, RuntimeError) as error:
        raise DataError(
            "the stored examples of earlier tasks have another form than the device's data; start this run's memory "
            "anew, or bring back the data that it was made from"
        ) from error


def has_equal_sizes(examples: EncodedDataset) -> bool:
    """Whether all rows take equally many bytes."""
    return isinstance(examples, EncodedPictures)


def _find_kind(examples: EncodedDataset) -> _Kind:
    found = next((kind for known, kind in _KINDS.items() if isinstance(examples, known)), None)
    if found is None:
        raise DataError(
            f"examples of the kind {type(examples).__name__} cannot be stored on a device; leave out the methods of "
            "stream.memory that store examples"
        )
    return found


def _pack_field(values: Field) -> bytes:
    """Return one array: the number of its type, its length, its values."""
    flat = values.reshape(-1)
    chosen = _choose_type(flat)
    return bytes([_TYPES.index(chosen)]) + len(flat).to_bytes(4, "little") + flat.astype(chosen).tobytes()


def _choose_type(values: Field) -> str:
    if values.dtype.kind == "f":
        return "<f8" if values.dtype.itemsize > 4 else "<f4"
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    return next(name for name in _INTEGERS if np.iinfo(name).min <= low and high <= np.iinfo(name).max)


def _unpack_fields(content: bytes) -> list[Field]:
    fields, at = [], 0
    while at < len(content):
        kind = np.dtype(_TYPES[content[at]])
        count = int.from_bytes(content[at + 1 : at + _HEAD], "little")
        fields.append(np.frombuffer(content, kind, count, at + _HEAD).copy())
        at += _HEAD + count * kind.itemsize
    return fields


def _join_texts(rows: Sequence[Field], padding: int) -> dict[str, Tensor]:
    return {"ids": pad_rows([row.tolist() for row in rows], padding), "lengths": _count_values(rows)}


def _count_values(rows: Sequence[Field]) -> Tensor:
    return torch.tensor([len(row) for row in rows])


def _stack_like(like: Tensor, rows: Sequence[Field]) -> Tensor:
    """Return rows as a tensor of the type, and of the form of a row, of ``like``."""
    return torch.from_numpy(np.stack(rows)).to(like.dtype).reshape(len(rows), *like.shape[1:])


def _list_text_fields(texts: EncodedTexts, row: int) -> list[Tensor]:
    length = int(texts.lengths[row])
    fields = [texts.ids[row, :length]]
    if texts.labels is not None:
        fields.append(texts.labels[row, :length] if texts.labels_per_token else texts.labels[row])
    return fields if texts.segments is None else [*fields, texts.segments[row, :length]]


def _restore_texts(template: EncodedTexts, rows: list[list[Field]], padding: int) -> EncodedDataset:
    changes: dict[str, Any] = _join_texts([row[0] for row in rows], padding)
    if template.labels is not None:
        labels = [row[1] for row in rows]
        changes["labels"] = _pad_labels(labels) if template.labels_per_token else _stack_like(template.labels, labels)
    if template.segments is not None:
        changes["segments"] = pad_rows([row[-1].tolist() for row in rows], 0)
    return replace(template, **changes, domains=None)


def _pad_labels(rows: Sequence[Field]) -> Tensor:
    return pad_rows([row.tolist() for row in rows], IGNORED_LABEL).long()


def _list_file_fields(texts: StoredTexts, row: int) -> list[Tensor]:
    batch = texts.make_batch([row])
    return [batch["input_ids"][0], batch["labels"][0]]


def _restore_file_texts(_: StoredTexts, rows: list[list[Field]], padding: int) -> EncodedDataset:
    texts = _join_texts([row[0] for row in rows], padding)
    return EncodedTexts(**texts, labels=_pad_labels([row[1] for row in rows]), domains=None, labels_per_token=True)


def _list_target_fields(texts: EncodedTargets, row: int) -> list[Tensor]:
    return [texts.ids[row, : int(texts.lengths[row])], texts.targets[row, : int(texts.target_lengths[row])]]


def _restore_targets(_: EncodedTargets, rows: list[list[Field]], padding: int) -> EncodedDataset:
    targets = [row[1] for row in rows]
    padded = {"targets": pad_rows([row.tolist() for row in targets], IGNORED_LABEL)}
    texts = _join_texts([row[0] for row in rows], padding)
    return EncodedTargets(**texts, **padded, target_lengths=_count_values(targets), domains=None)


def _list_pair_fields(pairs: EncodedPairs, row: int) -> list[Tensor]:
    places = (row, row + len(pairs))
    return [*(pairs.ids[place, : int(pairs.text_lengths[place])] for place in places), pairs.labels[row]]


def _restore_pairs(template: EncodedPairs, rows: list[list[Field]], padding: int) -> EncodedDataset:
    texts = _join_texts([row[side] for side in (0, 1) for row in rows], padding)
    labels = _stack_like(template.labels, [row[2] for row in rows])
    return EncodedPairs(texts["ids"], texts["lengths"], labels, None)


def _list_preference_fields(pairs: EncodedPreferences, row: int) -> list[Tensor]:
    places = (row, row + len(pairs))
    slices = [(place, slice(int(pairs.text_lengths[place]))) for place in places]
    fields = [tensor[place, part] for tensor in (pairs.ids, pairs.labels) for place, part in slices]
    return fields if pairs.references is None else [*fields, pairs.references[list(places)]]


def _restore_preferences(template: EncodedPreferences, rows: list[list[Field]], padding: int) -> EncodedDataset:
    texts = _join_texts([row[side] for side in (0, 1) for row in rows], padding)
    labels = pad_rows([row[side].tolist() for side in (2, 3) for row in rows], IGNORED_LABEL)
    references = None
    if template.references is not None:
        references = torch.from_numpy(np.stack([row[4] for row in rows]).T.copy()).reshape(-1)
    return EncodedPreferences(texts["ids"], labels, texts["lengths"], None, references)


def _list_picture_fields(pictures: EncodedPictures, row: int) -> list[Tensor]:
    pixels = pictures.pixels[row]
    return [torch.tensor([pictures.fitted, *pixels.shape]), pixels, _view_bytes(pictures.labels[row])]


def _view_bytes(label: Tensor) -> Tensor:
    """Return a label as bytes, of which all labels have equally many, so that all pictures have."""
    return label.reshape(-1).contiguous().view(torch.uint8)


def _restore_pictures(template: EncodedPictures, rows: list[list[Field]], _: int) -> EncodedDataset:
    [(fitted, *shape)] = {tuple(row[0].tolist()) for row in rows}  # ValueError if sizes differ
    pixels = torch.from_numpy(np.stack([row[1] for row in rows])).reshape(-1, *shape)
    labels = torch.from_numpy(np.stack([row[2] for row in rows])).view(template.labels.dtype)
    return replace(
        template,
        pixels=pixels,
        labels=labels.reshape(-1, *template.labels.shape[1:]),
        domains=None,
        fitted=bool(fitted),
    )


def _list_audio_fields(recordings: EncodedAudio, row: int) -> list[Tensor]:
    samples = recordings.samples[recordings.starts[row] : recordings.starts[row + 1]]
    return [torch.from_numpy(samples), recordings.labels[row]]


def _restore_audio(template: EncodedAudio, rows: list[list[Field]], _: int) -> EncodedDataset:
    waves = [row[0].astype(np.int16) for row in rows]
    labels = _stack_like(template.labels, [row[1] for row in rows])
    return EncodedAudio(np.concatenate(waves), np.cumsum([0, *map(len, waves)]), template.reader, labels, None)


def _list_spectrogram_fields(spectrograms: EncodedSpectrograms, row: int) -> list[Tensor]:
    return [spectrograms.inputs[row], spectrograms.labels[row]]


def _restore_spectrograms(template: EncodedSpectrograms, rows: list[list[Field]], _: int) -> EncodedDataset:
    inputs, labels = ([row[field] for row in rows] for field in (0, 1))
    return EncodedSpectrograms(
        _stack_like(template.inputs, inputs), template.name, _stack_like(template.labels, labels), None
    )


_KINDS: dict[type[Any], _Kind] = {
    EncodedTexts: _Kind(_list_text_fields, _restore_texts),
    StoredTexts: _Kind(_list_file_fields, _restore_file_texts),
    EncodedTargets: _Kind(_list_target_fields, _restore_targets),
    EncodedPairs: _Kind(_list_pair_fields, _restore_pairs),
    EncodedPreferences: _Kind(_list_preference_fields, _restore_preferences),
    EncodedPictures: _Kind(_list_picture_fields, _restore_pictures),
    EncodedAudio: _Kind(_list_audio_fields, _restore_audio),
    EncodedSpectrograms: _Kind(_list_spectrogram_fields, _restore_spectrograms),
}
