"""Parse the JSON in a request, with limits on its depth and its numbers."""

import json
import math
from typing import Any

from fedtune.server.gateway.refusal import RequestRefusedError

__all__ = ["read_json"]

_DEEPEST = 64
"""The largest depth of lists and objects. A recipe has ten levels. Recursive functions can handle this depth."""
_LARGEST = 1 << 63
"""Larger whole numbers fit no database column."""
_DIGITS = 20


def read_json(body: bytes) -> Any:
    """Return the value in a body; None if it is empty. Raise RequestRefusedError (400) for invalid JSON."""
    if not body:
        return None
    try:
        value = json.loads(body, parse_int=_whole, parse_float=_finite, parse_constant=_refused)
        json.dumps(value, ensure_ascii=False).encode()  # raises for a lone surrogate, which no database accepts
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:
        raise RequestRefusedError(400, f"the body is not valid JSON ({str(error)[:200]}); update fedtune") from error
    if _deeper(value, _DEEPEST):
        raise _too_deep()
    return value


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested deeper than ``levels``. It does not recurse."""
    level = [value]
    for _ in range(levels):
        level = [inner for one in level for inner in _inside(one)]
    return any(isinstance(one, list | dict) for one in level)


def _inside(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _whole(text: str) -> int:
    if len(text) > _DIGITS or not -_LARGEST <= int(text) < _LARGEST:
        raise ValueError("a whole number needs more than 64 bits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large for a float")
    return value


def _refused(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _too_deep() -> RequestRefusedError:
    return RequestRefusedError(
        400, f"the body has lists or objects nested more than {_DEEPEST} levels deep; send flatter JSON"
    )
