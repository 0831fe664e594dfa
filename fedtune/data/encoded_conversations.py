"""Conversations as tokens, of which some are targets: by default what the assistant writes."""

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from fedtune.data.assistant_mask import AssistantMask, find_assistant_mask, find_last_reply, teaches_to_stop
from fedtune.data.chat_rendering import ChatRenderer
from fedtune.data.conversations import Conversation
from fedtune.data.encoded_texts import IGNORED_LABEL, EncodedTexts, pad_rows
from fedtune.data.table import Table
from fedtune.errors import DataError, FedtuneWarning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["LossOn", "encode_conversations", "iter_conversation_tokens", "iter_encoded_conversations"]

LossOn = Literal["assistant", "completion", "all"]
_CUTS = {
    "turns": "lack their oldest turns",
    "end": "the end of the last one",
    "beginning": "the beginning of the last one",
}


@dataclass(frozen=True)
class _Example:
    """Token ids with whether each is a target; ``cuts`` says what was cut."""

    ids: list[int]
    targets: list[bool]
    turns: int
    lost: int
    cuts: tuple[str, ...] = ()


@dataclass
class _Tally:
    """How many conversations were encoded, what was cut from them, and how many replies are no targets."""

    examples: int = 0
    long: int = 0
    turns: int = 0
    lost: int = 0
    cuts: Counter[str] = field(default_factory=Counter)

    def add(self, examples: Sequence[_Example]) -> None:
        self.examples += len(examples)
        self.long += sum(bool(one.cuts) for one in examples)
        self.turns += sum(one.turns for one in examples)
        self.lost += sum(one.lost for one in examples)
        self.cuts.update(cut for one in examples for cut in one.cuts)


def encode_conversations(
    table: Table, tokenizer: "PreTrainedTokenizerBase", max_length: int, loss_on: LossOn
) -> EncodedTexts:
    """The column ``messages`` as at most ``max_length`` tokens, each with a label where it is a target.

    No conversation is left out and none is left without a target. Warnings count what was cut and what is not trained.
    DataError where a conversation has no target or the template refuses it; ModelError for a template that cannot be
    used.
    """
    [found] = iter_encoded_conversations(table, tokenizer, max_length, loss_on, max(1, len(table)))
    return found


def iter_encoded_conversations(
    table: Table, tokenizer: "PreTrainedTokenizerBase", max_length: int, loss_on: LossOn, size: int
) -> Iterator[EncodedTexts]:
    """Encode ``size`` conversations at a time as ``encode_conversations`` does. The warnings count those of all."""
    renderer, tally = ChatRenderer(tokenizer), _Tally()
    for start in range(0, max(1, len(table)), size):
        part = table.select(range(start, min(start + size, len(table))))
        rows = zip(part["messages"], part["tools"], strict=True)
        examples = [_encode(renderer, messages, tools, max_length, loss_on) for messages, tools in rows]
        tally.add(examples)
        yield _collect(examples, int(tokenizer.pad_token_id), part.domains)
    _warn_of_cuts(tally, max_length)
    _warn_of_lost_turns(tally)
    if loss_on != "all" and not teaches_to_stop(renderer):
        _warn(
            "the chat template has no sign among the targets that ends a reply, so the model does not learn to stop; "
            "choose a template with one"
        )


def _collect(examples: Sequence[_Example], padding: int, domains: list[str] | None) -> EncodedTexts:
    labels = [
        [token if target else IGNORED_LABEL for token, target in zip(one.ids, one.targets, strict=True)]
        for one in examples
    ]
    return EncodedTexts(
        pad_rows([one.ids for one in examples], padding),
        torch.tensor([len(one.ids) for one in examples]),
        pad_rows(labels, IGNORED_LABEL).long(),
        domains,
        labels_per_token=True,
    )


def iter_conversation_tokens(
    table: Table, tokenizer: "PreTrainedTokenizerBase", order: Sequence[int]
) -> Iterator[list[int]]:
    """Token ids of whole conversations in an order."""
    renderer, messages, tools = ChatRenderer(tokenizer), table.column("messages"), table.column("tools")
    for row in order:
        yield renderer.encode(messages[row], tools[row]).ids


def _encode(
    renderer: ChatRenderer, messages: Conversation, tools: Sequence[Any] | None, max_length: int, loss_on: LossOn
) -> _Example:
    """A conversation that fits; the oldest exchanges go first, and the last one is cut."""
    kept = messages if loss_on == "all" else _drop_unanswered(messages)
    example, cuts = _mask(renderer, kept, tools, loss_on), []
    while len(example.ids) > max_length and (shorter := _drop_oldest(kept)) is not None:
        kept, cuts = shorter, ["turns"]
        example = _mask(renderer, kept, tools, loss_on)
    if len(example.ids) > max_length:
        return _cut_tokens(example, max_length, cuts)
    return _Example(example.ids, example.targets, example.turns, example.lost, tuple(cuts))


def _drop_unanswered(messages: Conversation) -> Conversation:
    """Without what follows the last turn of the assistant: no target comes after it."""
    last = max(number for number, message in enumerate(messages) if message["role"] == "assistant")
    return messages[: last + 1]


def _drop_oldest(messages: Conversation) -> Conversation | None:
    """Without the oldest exchange, from a user's message to the next; None where there is only one."""
    users = [number for number, message in enumerate(messages) if message["role"] == "user"]
    begin = next((number for number, message in enumerate(messages) if message["role"] != "system"), 0)
    later = [number for number in users if number > begin]
    if not later or not any(message["role"] == "assistant" for message in messages[later[0] :]):
        return None
    return [*messages[:begin], *messages[later[0] :]]


def _mask(renderer: ChatRenderer, messages: Conversation, tools: Sequence[Any] | None, loss_on: LossOn) -> _Example:
    """A conversation with its targets; DataError without one."""
    chat = renderer.encode(messages, tools)
    if loss_on == "all":
        return _Example(chat.ids, [True] * len(chat.ids), 0, 0)
    first = find_last_reply(messages) if loss_on == "completion" else 0
    found = find_assistant_mask(renderer, messages, tools, chat, first=first)
    if not any(found.mask[1:]):
        raise DataError(_describe_nothing(messages, found))
    return _Example(chat.ids, found.mask, found.turns, found.lost)


def _describe_nothing(messages: Conversation, found: AssistantMask) -> str:
    begin = str(messages[0]["content"])[:40]
    where = f"the conversation that begins with {begin!r}"
    if found.lost:
        return (
            f"the chat template writes the reply of {where} otherwise than it asks for one, so its tokens cannot be "
            "told apart; name another chat_template, or one with {% generation %} around what the assistant writes"
        )
    return f"the assistant writes nothing in {where}, so there is nothing to learn; drop it or fill in the reply"


def _cut_tokens(example: _Example, max_length: int, cuts: list[str]) -> _Example:
    """The first tokens where a target is among them, else the last ones up to the last target."""
    stop, kind = max_length, "end"
    if not any(example.targets[1:max_length]):
        stop, kind = max(at for at, target in enumerate(example.targets) if target) + 1, "beginning"
    part = slice(stop - max_length, stop)
    return _Example(example.ids[part], example.targets[part], example.turns, example.lost, (*cuts, kind))


def _warn_of_cuts(tally: _Tally, max_length: int) -> None:
    if not tally.long:
        return
    told = ", ".join(f"{tally.cuts[cut]} {words}" for cut, words in _CUTS.items() if tally.cuts[cut])
    _warn(
        f"{tally.long} of {tally.examples} conversations are longer than train.max_length {max_length} and are cut: "
        f"{told}; each keeps a target"
    )


def _warn_of_lost_turns(tally: _Tally) -> None:
    if tally.lost:
        _warn(
            f"{tally.lost} of {tally.turns} replies are not trained on, because the chat template writes them "
            "otherwise once another turn follows; a template with {% generation %} marks them all"
        )


def _warn(sentence: str) -> None:
    warnings.warn(sentence, FedtuneWarning, stacklevel=4)
