"""Converts values to JSON that is valid for every parser and safe to print to a terminal.

Numbers that are not finite become null, because JSON cannot express them. Characters that do not print (terminal escape
codes, direction marks, lone surrogates) are escaped; the others stay readable.
"""

import json
import math
from typing import Any

__all__ = ["json_text"]


def json_text(value: Any) -> str:
    """Return JSON text, indented by two. Tuples become lists."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    return "".join(map(_printable, text)) if not text.replace("\n", "").isprintable() else text


def _printable(character: str) -> str:
    return character if character.isprintable() or character == "\n" else json.dumps(character)[1:-1]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
