"""Texts concatenated into blocks of tokens, the usual calibration data of language models."""

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
    """Yield the token ids of one text at a time, in shuffled order."""
    for row in shuffle_rows(len(documents)):
        yield tokenizer(documents[row], verbose=False)["input_ids"]


def shuffle_rows(count: int) -> list[int]:
    """Return the row numbers in an order that is always the same."""
    order: list[int] = np.random.default_rng(_SEED).permutation(count).tolist()
    return order


def iter_token_blocks(
    rows: Iterable[Sequence[int]], *, block_size: int = _BLOCK, num_documents: int = _DOCUMENTS, batch: int = 8
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of token ids [k, block] from concatenated texts.

    Only the first ``num_documents`` texts that are not empty and fit in a block are used. The remainder is dropped.
    Raises DataError when there is less than one block.
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
