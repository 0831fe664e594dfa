"""Texts end to end in blocks of tokens, as calibration data of language models is usually made."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedtune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["iter_shuffled_tokens", "iter_token_blocks", "shuffle_rows"]

_SEED, _DOCUMENTS, _BLOCK = 42, 256, 512


def iter_shuffled_tokens(documents: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> Iterator[list[int]]:
    """Token ids of texts in a shuffled order, one text at a time."""
    for row in shuffle_rows(len(documents)):
        yield tokenizer(documents[row], verbose=False)["input_ids"]


def shuffle_rows(count: int) -> list[int]:
    """The numbers of so many rows in an order that is always the same."""
    order: list[int] = np.random.default_rng(_SEED).permutation(count).tolist()
    return order


def iter_token_blocks(
    rows: Iterable[Sequence[int]], *, block_size: int = _BLOCK, num_documents: int = _DOCUMENTS, batch: int = 8
) -> Iterator[dict[str, Tensor]]:
    """Token ids [k, block] of texts end to end: the first ``num_documents`` not empty, at most a block long.

    What is left over is dropped; DataError when there is not a single block.
    """
    taken: list[int] = []
    count = 0
    for row in rows:
        if count == num_documents:
            break
        if 0 < len(row) <= block_size:
            taken += row
            count += 1
    if len(taken) < block_size:
        raise DataError(
            f"the calibration text gives {len(taken)} tokens, less than a block of {block_size}; bring more"
        )
    whole = torch.tensor(taken[: len(taken) // block_size * block_size]).reshape(-1, block_size)
    for ids in whole.split(batch):
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
