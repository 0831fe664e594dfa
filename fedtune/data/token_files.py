"""Encoded texts in files: written once, then read a batch at a time, for data that does not fit into memory.

A folder holds the tokens of all texts end to end (``tokens``), their lengths, how often each token occurs, and, where a
text is not predicted as a whole, a label for each token (``labels``). Where long texts are split, their further pieces
are rows behind those of the texts; ``starts`` says where each row begins, ``owners`` which text a piece continues. Rows
are read, not mapped: pages of a mapped file count as memory of the process, which a device's budget limits.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtune.data.encoded_texts import IGNORED_LABEL, EncodedTexts
from fedtune.errors import StoreError

__all__ = ["StoredTexts", "write_token_files"]

_SMALL_VOCABULARY = 1 << 16


@dataclass(frozen=True)
class StoredTexts:
    """Texts in the files of a folder, with the batches of the ``EncodedTexts`` they were written from."""

    folder: Path
    domains: list[str] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.lengths) - (0 if self.owners is None else len(self.owners))

    @cached_property
    def owners(self) -> Tensor | None:
        """The text that each row behind the texts continues; None where no text is split."""
        file = self.folder / "owners.npy"
        return torch.from_numpy(np.load(file)) if file.exists() else None

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each text."""
        return torch.from_numpy(np.load(self.folder / "lengths.npy"))

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        lengths: NDArray[np.int64] = self.lengths.numpy()
        starts: NDArray[np.int64]
        starts = np.cumsum(lengths) - lengths if self.owners is None else np.load(self.folder / "starts.npy")
        return starts

    @cached_property
    def _about(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "about.json").read_text(encoding="utf-8"))
        return found

    def count_tokens(self) -> Tensor:
        """How often each token occurs [largest + 1]."""
        return torch.from_numpy(np.load(self.folder / "counts.npy"))

    @property
    def largest_token(self) -> int:
        """The largest token of all batches, padding included."""
        padded = int(self.lengths.min()) < int(self.lengths.max())
        return max(len(self.count_tokens()) - 1, self._about["padding"] if padded else 0)

    def make_batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels [k, longest of the batch]."""
        lengths = self.lengths[torch.as_tensor(indices)]
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = self._read("tokens", self._about["tokens"], indices, mask, self._about["padding"])
        labels = (
            self._read("labels", "<i4", indices, mask, IGNORED_LABEL)
            if self._about["labels"]
            else ids.masked_fill(~mask, IGNORED_LABEL)
        )
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}

    def _read(self, name: str, kind: str, indices: Sequence[int], mask: Tensor, fill: int) -> Tensor:
        """int64 [k, longest]: rows of a file, filled up on the right."""
        size = np.dtype(kind).itemsize
        rows = torch.full(mask.shape, fill, dtype=torch.int64)
        with (self.folder / name).open("rb", buffering=0) as file:
            for row, index in zip(rows, indices, strict=True):
                count = int(self.lengths[index])
                content = os.pread(file.fileno(), count * size, int(self._starts[index]) * size)
                row[:count] = torch.from_numpy(np.frombuffer(content, kind).astype(np.int64))
        return rows


def write_token_files(folder: Path, slices: Iterable[EncodedTexts], *, vocabulary: int, padding: int) -> None:
    """Write the texts of all slices, with a label per token or none; ``folder`` appears when it is whole.

    Token ids are below ``vocabulary``; ``padding`` is what batches are filled up with.

    Raises StoreError, with nothing left behind, when the disk is full or the folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
    except OSError as error:
        raise StoreError(f"cannot write {folder}: {error.strerror}; free or choose another place") from error
    try:
        _write_slices(beside, slices, "<u2" if vocabulary <= _SMALL_VOCABULARY else "<i4", padding)
        if not folder.exists():  # another process may have been faster
            beside.replace(folder)
    except OSError as error:
        raise StoreError(f"cannot write {folder}: {error.strerror}; free or choose another place") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_slices(folder: Path, slices: Iterable[EncodedTexts], kind: str, padding: int) -> None:
    lengths: list[NDArray[np.int64]] = []
    owners: list[NDArray[np.int64]] = []
    counts, texts_before = np.zeros(0, np.int64), 0
    labelled = False
    with (folder / "tokens").open("wb") as tokens, (folder / "labels").open("wb") as labels:
        for texts in slices:
            mask = torch.arange(texts.ids.shape[1]) < texts.lengths[:, None]
            flat = _append(tokens, texts.ids, mask, kind)
            counts = _add(counts, np.bincount(flat))
            lengths.append(texts.lengths.numpy())
            if texts.owners is not None:
                owners.append(texts.owners.numpy() + texts_before)
                texts_before += len(texts)
            if texts.labels is not None:
                labelled = True
                _append(labels, texts.labels, mask, "<i4")
        for file in (tokens, labels):
            file.flush()
            os.fsync(file.fileno())
    _save_lengths(folder, lengths, owners)
    np.save(folder / "counts.npy", counts)
    about = {"tokens": kind, "labels": labelled, "padding": padding}
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def _save_lengths(folder: Path, lengths: list[NDArray[np.int64]], owners: list[NDArray[np.int64]]) -> None:
    """Write the length of each row; with further pieces, those of all slices behind the texts of all slices."""
    whole = np.concatenate(lengths)
    if not sum(map(len, owners)):
        np.save(folder / "lengths.npy", whole)
        return
    is_piece = np.concatenate(
        [np.arange(len(rows)) >= len(rows) - len(pieces) for rows, pieces in zip(lengths, owners, strict=True)]
    )
    order = np.argsort(is_piece, kind="stable")
    np.save(folder / "lengths.npy", whole[order])
    np.save(folder / "starts.npy", (np.cumsum(whole) - whole)[order])
    np.save(folder / "owners.npy", np.concatenate(owners))


def _append(file: BinaryIO, rows: Tensor, mask: Tensor, kind: str) -> NDArray[Any]:
    """Write the entries of rows that are no padding, and return them."""
    flat: NDArray[Any] = rows[mask].numpy().astype(kind)
    file.write(flat.tobytes())
    return flat


def _add(counts: NDArray[np.int64], more: NDArray[np.int64]) -> NDArray[np.int64]:
    whole = np.zeros(max(len(counts), len(more)), np.int64)
    whole[: len(counts)] += counts
    whole[: len(more)] += more
    return whole
