"""Which tokens of a conversation the assistant writes: what it says, and the token that ends its turn.

Where a template marks them by ``{% generation %}``, its marks count. Else each turn is found by rendering the
conversation up to it, with the words that ask for a reply, and through it: a turn is what the second adds to the first.
That holds only where both are beginnings of the whole. Some templates write a turn otherwise once another follows it,
e.g. drop its thinking; such a turn is left out.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from fedtune.data.chat_rendering import PROBE, ChatRenderer, RenderedChat, Span
from fedtune.data.conversations import Conversation
from fedtune.errors import DataError

__all__ = ["AssistantMask", "find_assistant_mask", "find_last_reply", "mask_spans", "teaches_to_stop"]


class AssistantMask(NamedTuple):
    """Whether each token is a target, and the numbers of assistant's turns and of those that could not be found."""

    mask: list[bool]
    turns: int = 0
    lost: int = 0


def find_assistant_mask(
    renderer: ChatRenderer, messages: Conversation, tools: Sequence[Any] | None, chat: RenderedChat, *, first: int = 0
) -> AssistantMask:
    """The assistant's tokens among ``chat``, those of ``messages`` from number ``first`` on."""
    turns = [number for number, one in enumerate(messages) if one["role"] == "assistant" and number >= first]
    if chat.marked is None:
        spans = [_find_turn(renderer, messages, tools, chat.text, number) for number in turns]
        found = [span for span in spans if span is not None]
        return AssistantMask(mask_spans(chat.offsets, found), len(turns), len(spans) - len(found))
    if not first:
        return AssistantMask(chat.marked, len(turns))
    start = _find_start(renderer, messages, tools, chat.text, turns[0])
    if start is None:
        return AssistantMask([False] * len(chat.ids), len(turns), len(turns))
    later = (end > start for _, end in chat.offsets)
    return AssistantMask([mark and late for mark, late in zip(chat.marked, later, strict=True)], len(turns))


def find_last_reply(messages: Conversation) -> int:
    """The number of the first message behind the last one of a user."""
    users = [number for number, message in enumerate(messages) if message["role"] == "user"]
    return users[-1] + 1 if users else 0


def teaches_to_stop(renderer: ChatRenderer) -> bool:
    """Whether the targets of a reply go on behind its words, so that a model learns where to end."""
    try:
        chat = renderer.encode(PROBE)
    except DataError:  # a template that wants more than a question and a reply
        return True
    mask = find_assistant_mask(renderer, PROBE, None, chat).mask
    ends = [end for (_, end), target in zip(chat.offsets, mask, strict=True) if target]
    content = PROBE[-1]["content"]
    return not ends or max(ends) > chat.text.rfind(content) + len(content)


def mask_spans(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Whether each token shares a character with one of the spans, which follow one another."""
    mask, number = [], 0
    for start, end in offsets:
        while number < len(spans) and spans[number][1] <= start:
            number += 1
        mask.append(number < len(spans) and spans[number][0] < end)
    return mask


def _find_turn(
    renderer: ChatRenderer, messages: Conversation, tools: Sequence[Any] | None, text: str, number: int
) -> Span | None:
    """Where a turn begins and ends, without the white space behind its last sign; None where that cannot be told."""
    start = _find_start(renderer, messages, tools, text, number)
    if start is None:
        return None
    through = text if number == len(messages) - 1 else renderer.render(messages[: number + 1], tools)
    if not text.startswith(through):
        through = through.removesuffix(renderer.end_token)  # some write it behind a whole conversation
    if not text.startswith(through) or len(through) < start:
        return None
    return start, len(through.rstrip() if renderer.ending.strip() else through)


def _find_start(
    renderer: ChatRenderer, messages: Conversation, tools: Sequence[Any] | None, text: str, number: int
) -> int | None:
    """Behind the words that ask for the turn."""
    try:
        before = renderer.render(messages[:number], tools, asks=True)
    except DataError:  # e.g. nothing stands before the turn, and the template needs something
        return None
    return len(before) if text.startswith(before) else None
