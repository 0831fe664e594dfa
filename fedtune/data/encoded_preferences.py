"""Prompts with a chosen and a rejected completion as token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedtune.data.encoded_texts import IGNORED_LABEL, pad_rows
from fedtune.data.table import Table
from fedtune.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EncodedPreferences", "encode_preferences"]


@dataclass(frozen=True)
class EncodedPreferences:
    """Token ids and labels [2 n, longest], padded on the right: the chosen texts, then the rejected ones.

    Labels are -100 in the prompt. ``references`` [2 n] are log-probabilities of the completions under the model that
    training starts from.
    """

    ids: Tensor
    labels: Tensor
    text_lengths: Tensor
    domains: list[str] | None
    references: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids) // 2

    @property
    def lengths(self) -> Tensor:
        """[n]: tokens of the longer text of each pair."""
        return self.text_lengths.reshape(2, -1).amax(0)

    def make_batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels [2 k, longest of the batch], and ``references`` [2 k] where known."""
        chosen = torch.as_tensor(indices)
        rows = torch.cat([chosen, chosen + len(self)])
        lengths = self.text_lengths[rows]
        longest = int(lengths.max())
        mask = torch.arange(longest) < lengths[:, None]
        batch = {"input_ids": self.ids[rows, :longest].long(), "attention_mask": mask.long()}
        known = {} if self.references is None else {"references": self.references[rows]}
        return {**batch, "labels": self.labels[rows, :longest].long(), **known}


def encode_preferences(table: Table, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> EncodedPreferences:
    """The columns ``prompt``, ``chosen`` and ``rejected`` as at most ``max_length`` tokens.

    A text that is too long loses the beginning of its prompt. DataError for a completion that leaves no token of the
    prompt, and for two equal completions; ModelError when the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end token, which preference needs; choose another model")
    prompts = tokenizer(list(table["prompt"]))["input_ids"]
    texts: list[tuple[list[int], list[int]]] = []
    for side in ("chosen", "rejected"):
        completions = tokenizer(list(table[side]), add_special_tokens=False)["input_ids"]
        pairs = zip(prompts, completions, strict=True)
        end = int(tokenizer.eos_token_id)
        texts += [_join(row, prompt, [*text, end], max_length) for row, (prompt, text) in enumerate(pairs, 1)]
    _check_difference(texts)
    padding = int(tokenizer.pad_token_id)
    return EncodedPreferences(
        pad_rows([ids for ids, _ in texts], padding),
        pad_rows([labels for _, labels in texts], IGNORED_LABEL),
        torch.tensor([len(ids) for ids, _ in texts]),
        table.domains,
    )


def _join(row: int, prompt: list[int], completion: list[int], max_length: int) -> tuple[list[int], list[int]]:
    """Token ids and labels of a prompt with its completion."""
    room = max_length - len(completion)
    if room < 1 or not prompt:
        raise DataError(
            f"row {row} has a completion of {len(completion)} tokens, which leaves no token of its prompt within "
            f"train.max_length {max_length}; raise it, or shorten the completion"
        )
    kept = prompt[-room:]
    return [*kept, *completion], [*([IGNORED_LABEL] * len(kept)), *completion]


def _check_difference(texts: Sequence[tuple[list[int], list[int]]]) -> None:
    half = len(texts) // 2
    for row, (chosen, rejected) in enumerate(zip(texts[:half], texts[half:], strict=True), 1):
        if chosen == rejected:
            raise DataError(f"row {row} has the same text chosen and rejected, which says nothing; drop it")
