"""Conversations to render, chat templates of our own with and without marks, and a slow twin that masks them.

The twin never renders a template: it writes each conversation as a list of parts, each a target or not, character by
character.
"""

import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from fedtune.data import Table, Values
from fedtune.data.column import objects

__all__ = ["TEMPLATES", "Template", "chat_table", "chat_tokenizer", "make_conversations", "mask_slowly"]

SIGNS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>")
CONTENTS = (
    *(
        "hello",
        "how are you?",
        "fine, thanks",
        "a\n\nb",
        "\nsecond line",
        "\n\n\nthird",
        " spaces ",
        "tab\t",
        "trailing\n\n",
        "",
    ),
    *("héllo wörld", "你好世界", "😀 👩‍👩‍👧", "مرحبا", "e\u0301", "<|im_end|>", "<|im_start|>assistant\nno", "</s>"),
    *("[A] fake", "{{ messages }}", "{% generation %}", "<|end|>\n<|assistant|>\nfake<|end|>", "### Assistant\n"),
)
Conversation = list[dict[str, Any]]
Part = tuple[str, bool]


class Template(NamedTuple):
    """A chat template without marks and with them, and the twin's parts."""

    plain: str
    marked: str
    write: Callable[[Conversation], list[Part]]


@cache
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level pairs, as most chat models have them: signs are one token, line breaks may merge."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=340, special_tokens=list(SIGNS), initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([f"{content}\n\n" for content in CONTENTS if "<" not in content] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_conversations(count: int, seed: int = 0) -> list[Conversation]:
    """With a system prompt or not, of one to six exchanges."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        turns = ["system"] * draw.randrange(2) + ["user", "assistant"] * draw.randint(1, 6)
        found.append([{"role": role, "content": draw.choice(CONTENTS)} for role in turns])
    return found


def chat_table(conversations: Sequence[Conversation], tools: Sequence[Any] | None = None) -> Table:
    """The canonical columns."""
    described = [None] * len(conversations) if tools is None else tools
    return Table({"messages": Values(objects(conversations)), "tools": Values(objects(described))})


def mask_slowly(parts: Sequence[Part], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Token ids, and whether a token has a character of a target."""
    text = "".join(part for part, _ in parts)
    targets = [target for part, target in parts for _ in part]
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return found["input_ids"], [any(targets[start:end]) for start, end in found["offset_mapping"]]


def _write_chatml(messages: Conversation) -> list[Part]:
    parts: list[Part] = []
    for message in messages:
        reply = message["role"] == "assistant"
        parts += [
            (f"<|im_start|>{message['role']}\n", False),
            (f"{message['content']}<|im_end|>", reply),
            ("\n", False),
        ]
    return parts


def _write_ended(messages: Conversation) -> list[Part]:
    """The end token stands once, behind the whole conversation."""
    parts: list[Part] = []
    for message in messages:
        sign = "<|assistant|>" if message["role"] == "assistant" else "<|user|>"
        reply = message["role"] == "assistant"
        parts += [(f"{sign}\n", False), (f"{message['content']}<|end|>", reply), ("\n", False)]
    return [*parts[:-1], ("\n</s>", True)]


def _write_letters(messages: Conversation) -> list[Part]:
    """No signs but the end token, and contents without white space around them."""
    parts: list[Part] = [("<s>", False)]
    for message in messages:
        text, reply = message["content"].strip(), message["role"] == "assistant"
        parts += [
            (f"[{message['role'][0].upper()}] ", False),
            (text + ("</s>" if reply else ""), reply),
            ("\n\n", False),
        ]
    return parts


_MARK, _END = "{% generation %}", "{% endgeneration %}"
_ENDED = (
    "{% for one in messages %}{{ '<|assistant|>\n' if one.role == 'assistant' else '<|user|>\n' }}"
    "{% if one.role == 'assistant' %}MARK{{ one.content + '<|end|>' }}END{% else %}"
    "{{ one.content + '<|end|>' }}{% endif %}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}MARK{{ '\n' + eos_token }}END{% endif %}"
)
_CHATML = (
    "{% for one in messages %}{{ '<|im_start|>' + one.role + '\n' }}"
    "{% if one.role == 'assistant' %}MARK{{ one.content + '<|im_end|>' }}END{% else %}"
    "{{ one.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LETTERS = (
    "{{ bos_token }}{% for one in messages %}{{ '[' + one.role[0] | upper + '] ' }}"
    "{% if one.role == 'assistant' %}MARK{{ one.content.strip() + eos_token }}END{% else %}"
    "{{ one.content.strip() }}{% endif %}{{ '\n\n' }}{% endfor %}{% if add_generation_prompt %}{{ '[A] ' }}{% endif %}"
)


def _forms(template: str, write: Callable[[Conversation], list[Part]]) -> Template:
    marked = template.replace("MARK", _MARK).replace("END", _END)
    return Template(template.replace("MARK", "").replace("END", ""), marked, write)


TEMPLATES = {
    "chatml": _forms(_CHATML, _write_chatml),
    "ended": _forms(_ENDED, _write_ended),
    "letters": _forms(_LETTERS, _write_letters),
}
