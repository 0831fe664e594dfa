"""Chat templates: those that are known by name, those of a file, and the one that a model's tokenizer brings."""

from pathlib import Path
from typing import Any

from fedtune.errors import ModelError, RecipeError

__all__ = ["CHAT_FORMATS", "read_chat_template", "set_chat_template"]

CHAT_FORMATS = {
    "chatml": (
        "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "headings": (
        "{% set headings = {'system': 'System', 'user': 'User', 'assistant': 'Assistant', 'tool': 'Tool'} %}"
        "{% for turn in messages %}### {{ headings[turn.role] }}\n{{ turn.content }}"
        "{% if turn.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}### Assistant\n{% endif %}"
    ),
    "plain": (
        "{% for turn in messages %}{{ turn.content }}"
        "{% if turn.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    ),
}
"""By name. Only ``chatml`` writes signs of its own; the others end a reply in the model's end token."""
_FILE = "file:"


def read_chat_template(wanted: str) -> str:
    """The template of a name, of ``file:PATH.jinja``, or written out in full; RecipeError for anything else."""
    if wanted in CHAT_FORMATS:
        return CHAT_FORMATS[wanted]
    if wanted.startswith(_FILE):
        path = Path(wanted.removeprefix(_FILE)).expanduser()
        if path.suffix != ".jinja":  # what is read is stored with a run: no other file should get there
            raise RecipeError(f"chat_template: {path} is no template; name a file that ends in .jinja")
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise RecipeError(f"chat_template: cannot read {path}; check the path and that it is text") from error
    if "{" in wanted:
        return wanted
    known = ", ".join(CHAT_FORMATS)
    raise RecipeError(f"chat_template: {wanted!r} is none of {known}, nor file:PATH.jinja or a Jinja template in full")


def set_chat_template(tokenizer: Any, wanted: str) -> None:
    """Give a tokenizer a template; ModelError where it lacks the end token that the template writes."""
    template = read_chat_template(wanted)
    if "eos_token" in template and tokenizer.eos_token is None:
        raise ModelError(
            "chat_template writes an end token, which the tokenizer lacks; choose another template or model"
        )
    tokenizer.chat_template = template
