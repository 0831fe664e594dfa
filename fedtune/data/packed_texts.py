"""Several texts in each row, for training: short texts then waste no room on padding.

The texts of a row do not see each other. Positions restart at 0 with each text, from which transformers derives a
block-diagonal attention mask; it does so where it is given no attention mask, so a batch has none. The first token of a
text is no label, as it would be predicted from the text before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedtune.data.best_fit import pack_best_fit
from fedtune.data.encoded_dataset import EncodedDataset
from fedtune.data.encoded_texts import IGNORED_LABEL

__all__ = ["PackedTexts", "add_pieces", "count_tokens", "pack_texts"]


@dataclass(frozen=True)
class PackedTexts:
    """Rows of texts with a label per token; ``rows`` are places in ``texts``."""

    texts: EncodedDataset
    rows: Sequence[Sequence[int]]
    domains: list[str] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each row."""
        sizes = self.texts.lengths
        assert sizes is not None
        return torch.tensor([int(sizes[list(row)].sum()) for row in self.rows])

    def count_texts(self, indices: Sequence[int]) -> int:
        """Texts in some rows. One that was split into pieces counts where its first piece is."""
        return sum(place < len(self.texts) for index in indices for place in self.rows[index])

    def count_targets(self, indices: Sequence[int]) -> int:
        """Labels in some rows."""
        return int((self.make_batch(indices)["labels"] != IGNORED_LABEL).sum())

    def make_batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """input_ids, position_ids and labels [k, longest of the batch]. Padding is a text of its own without labels."""
        made = [self._join_texts(self.rows[index]) for index in indices]
        ids, labels, positions = zip(*made, strict=True)
        longest = max(len(row) for row in ids)
        padded = [torch.cat([row, torch.arange(longest - len(row))]) for row in positions]
        return {
            "input_ids": pad_sequence(list(ids), batch_first=True),
            "position_ids": torch.stack(padded),
            "labels": pad_sequence(list(labels), batch_first=True, padding_value=IGNORED_LABEL),
        }

    def _join_texts(self, row: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens, labels and positions of a row's texts, end to end."""
        sizes = self.texts.lengths
        assert sizes is not None
        lengths = sizes[list(row)].tolist()
        batch = self.texts.make_batch(row)
        labels = batch["labels"].clone()
        labels[:, 0] = IGNORED_LABEL
        ids, wanted = (
            torch.cat([one[:size] for one, size in zip(tensor, lengths, strict=True)])
            for tensor in (batch["input_ids"], labels)
        )
        return ids, wanted, torch.cat([torch.arange(size) for size in lengths])


def pack_texts(texts: EncodedDataset, rows: NDArray[np.int64], max_length: int, seed: int) -> PackedTexts:
    """Some of the texts, with their further pieces, in rows of at most ``max_length`` tokens, by best-fit decreasing.

    The seed decides which of several texts of one length goes where. The lengths of the rows do not depend on it.
    """
    assert texts.lengths is not None
    rows = add_pieces(texts, rows)
    order = np.random.default_rng(seed).permutation(rows)
    places = pack_best_fit(texts.lengths[torch.from_numpy(order)].tolist(), max_length)
    return PackedTexts(texts, [order[row].tolist() for row in places])


def add_pieces(texts: EncodedDataset, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows of texts, followed by those of their further pieces."""
    owners: Tensor | None = getattr(texts, "owners", None)
    if owners is None or not len(owners):
        return rows
    starts, ends = (np.searchsorted(owners.numpy(), rows, side) for side in ("left", "right"))
    found = [np.arange(start, end) + len(texts) for start, end in zip(starts, ends, strict=True)]
    return np.concatenate([rows, *found])


def count_tokens(texts: EncodedDataset, rows: NDArray[np.int64]) -> int:
    """Tokens of some texts with their further pieces."""
    assert texts.lengths is not None
    return int(texts.lengths[torch.from_numpy(add_pieces(texts, rows))].sum())
