"""Chat formats that mergekit knows by name, as Jinja templates for transformers.

They follow the formats that the makers of the models describe. mergekit's llama3, alpaca and exaone add blank lines.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from fedtune.data.chat_formats import CHAT_FORMATS
from fedtune.errors import RecipeError
from fedtune.offline_merge.json_file import read_json

__all__ = ["CHAT_TEMPLATES", "resolve_chat_template"]

_ALTERNATE = (
    "{% if (turn.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant have to take turns, after a system message or without one') }}{% endif %}"
)

CHAT_TEMPLATES = {
    "chatml": CHAT_FORMATS["chatml"],
    "llama3": (
        "{{ bos_token }}{% for turn in messages %}<|start_header_id|>{{ turn.role }}<|end_header_id|>\n\n"
        "{{ turn.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "mistral": (
        "{% set told = messages[0].role == 'system' %}{{ bos_token }}"
        "{% for turn in (messages[1:] if told else messages) %}" + _ALTERNATE + "{% if turn.role == 'user' %} [INST] "
        "{% if told and loop.first %}{{ messages[0].content }}\n\n{% endif %}{{ turn.content }} [/INST]"
        "{% else %} {{ turn.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "alpaca": (
        "{% for turn in messages %}"
        "{% if turn.role != 'system' %}### "
        "{{ {'user': 'Instruction', 'user_context': 'Input'}.get(turn.role, 'Response') }}:\n{% endif %}"
        "{{ turn.content | trim }}\n\n{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
    "exaone": (
        "{% if messages[0].role != 'system' %}[|system|][|endofturn|]\n{% endif %}{% for turn in messages %}"
        "[|{{ turn.role }}|]{{ turn.content }}{{ '' if turn.role == 'user' else '[|endofturn|]' }}\n{% endfor %}"
        "{% if add_generation_prompt %}[|assistant|]{% endif %}"
    ),
}


def resolve_chat_template(wanted: str, folders: Iterable[Path]) -> str:
    """Return a template, the template of a format, or with ``auto`` the template of most models."""
    if wanted != "auto":
        if "{" not in wanted and wanted not in CHAT_TEMPLATES:
            known = ", ".join(("auto", *CHAT_TEMPLATES))
            raise RecipeError(f"chat_template: {wanted!r} is none of {known}, nor a Jinja template written out in full")
        return CHAT_TEMPLATES.get(wanted, wanted)
    found = [template for folder in folders if (template := _own(folder))]
    if not found:
        raise RecipeError("chat_template: auto finds none, since no model has one; write it out or leave it out")
    return Counter(found).most_common(1)[0][0]


def _own(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for file in ("chat_template.json", "tokenizer_config.json"):
        if (folder / file).is_file() and isinstance(found := read_json(folder / file).get("chat_template"), str):
            return found
    return None
