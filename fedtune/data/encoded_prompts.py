"""Prompts as token ids, and examples split into a prompt and the reply that is wanted."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from fedtune.data.chat_rendering import ChatRenderer
from fedtune.data.encoded_texts import IGNORED_LABEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EncodedPrompts", "encode_chat_prompts", "encode_text_prompts", "find_reply_end", "split_last_reply"]


class EncodedPrompts(NamedTuple):
    """Token ids of each prompt. ``stops`` are tokens that end a reply, beside those of the model."""

    rows: list[list[int]]
    stops: frozenset[int] = frozenset()


def encode_text_prompts(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str]) -> EncodedPrompts:
    """Texts to continue: as training has them, but without an end token."""
    rows: list[list[int]] = [list(row) for row in tokenizer(list(prompts), verbose=False)["input_ids"]]
    end = tokenizer.eos_token_id
    return EncodedPrompts([row[:-1] if len(row) > 1 and row[-1] == end else row for row in rows])


def encode_chat_prompts(
    tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[list[dict[str, Any]]]
) -> EncodedPrompts:
    """Conversations as the chat template writes them, up to where the assistant replies."""
    renderer = ChatRenderer(tokenizer)
    texts = [renderer.render(messages, asks=True) for messages in conversations]
    rows: list[list[int]] = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return EncodedPrompts(rows, find_reply_end(tokenizer))


def find_reply_end(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """The sign that the chat template writes behind a reply, where it is a token of its own."""
    found = tokenizer(ChatRenderer(tokenizer).ending, add_special_tokens=False)["input_ids"][:1]
    return frozenset(found) & frozenset(tokenizer.added_tokens_decoder)


def split_last_reply(ids: Tensor, labels: Tensor) -> tuple[list[int], list[int]]:
    """The tokens of an example before its last targets, and those targets; both empty without any target."""
    wanted = (labels != IGNORED_LABEL).nonzero()[:, 0].tolist()
    if not wanted:
        return [], []
    stop = wanted[-1] + 1
    start = next(at for at in range(stop - 1, -1, -1) if at == 0 or labels[at - 1] == IGNORED_LABEL)
    return ids[:start].tolist(), ids[start:stop].tolist()
