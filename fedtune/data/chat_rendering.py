"""Conversations as a model's chat template writes them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fedtune.data.conversations import Conversation
from fedtune.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PROBE", "ChatRenderer", "RenderedChat"]

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "reply"}]
"""A conversation to see what a template writes around a reply."""
Span = tuple[int, int]


@dataclass(frozen=True)
class RenderedChat:
    """Token ids of a conversation, the characters that each stands for, and the text itself."""

    ids: list[int]
    offsets: list[Span]
    text: str
    marked: list[bool] | None = None
    """Where the template itself marks what the assistant writes."""


class ChatRenderer:
    """Renders conversations by the chat template of a tokenizer; ModelError where it has none."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if not tokenizer.chat_template:
            raise ModelError(
                "the tokenizer has no chat template, which conversations are written by; name one in the task, e.g. "
                "task: {text-generation: {chat_template: chatml}}, or choose a model that is tuned for chat"
            )
        if not tokenizer.is_fast:
            raise ModelError("the tokenizer cannot tell where a token begins; choose a model with a fast one")
        self._tokenizer: Any = tokenizer

    def has_marks(self, tools: Sequence[Any] | None) -> bool:
        """Whether the template says itself what the assistant writes, by ``{% generation %}``."""
        return bool(_MARK.search(self._tokenizer.get_chat_template(tools=tools)))

    def render(self, messages: Conversation, tools: Sequence[Any] | None = None, *, asks: bool = False) -> str:
        """The text of a conversation; with ``asks`` it ends in what comes before a reply."""
        text: str = self._apply(messages, tools=tools, tokenize=False, add_generation_prompt=asks)
        return text

    def encode(self, messages: Conversation, tools: Sequence[Any] | None = None) -> RenderedChat:
        """The tokens of a conversation."""
        text = self.render(messages, tools)
        if self.has_marks(tools):
            found = self._apply(messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
            marked = list(map(bool, found["assistant_masks"]))
        else:
            found, marked = self._tokenizer(text, add_special_tokens=False, verbose=False), None
        return RenderedChat(list(found["input_ids"]), list(found.encodings[0].offsets), text, marked)

    @property
    def end_token(self) -> str:
        """The model's end token; empty where it has none."""
        return self._tokenizer.eos_token or ""

    @cached_property
    def ending(self) -> str:
        """What the template writes behind a reply."""
        try:
            return self.render(PROBE).rpartition(PROBE[-1]["content"])[2]
        except DataError:
            return ""

    def _apply(self, messages: Conversation, **settings: Any) -> Any:
        from jinja2 import TemplateError, TemplateSyntaxError

        try:
            return self._tokenizer.apply_chat_template(messages, **settings)
        except TemplateSyntaxError as error:
            raise ModelError(f"the chat template is no valid Jinja: {_first_line(error)}; mend it") from error
        except (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            begin = str(messages[0]["content"])[:40] if messages else ""
            raise DataError(
                f"the chat template cannot write the conversation that begins with {begin!r}: {_first_line(error)}; "
                "change the conversation, or name another chat_template",
                code="data-values",
            ) from error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).split("\n")[0].rstrip(".")
