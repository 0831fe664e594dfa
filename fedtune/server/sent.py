"""The JSON a request carries, bounded in size, depth and figures before anybody looks at it."""

import json
import math
from typing import Any

from fedtune.server.gateway.refusal import RequestRefusedError

__all__ = ["read_json"]

_DEEPEST = 64
"""Levels of lists and objects; a recipe has ten. Whatever walks through a value by recursion can walk that far."""
_LARGEST = 1 << 63
"""Beyond it a whole number fits no column of a database."""
_DIGITS = 20


def read_json(body: bytes) -> Any:
    """The value in a body, None if it is empty; RequestRefusedError (400) unless it is flat, finite JSON."""
    if not body:
        return None
    try:
        value = json.loads(body, parse_int=_whole, parse_float=_finite, parse_constant=_refused)
        json.dumps(value, ensure_ascii=False).encode()  # half a character has no bytes: no database keeps it
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:
        raise RequestRefusedError(
            400, f"the body is not JSON that can be used ({str(error)[:200]}); update fedtune"
        ) from error
    if _deeper(value, _DEEPEST):
        raise _too_deep()
    return value


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects lie in each other beyond some levels; level by level, so that it needs no stack."""
    level = [value]
    for _ in range(levels):
        level = [inner for one in level for inner in _inside(one)]
    return any(isinstance(one, list | dict) for one in level)


def _inside(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _whole(text: str) -> int:
    if len(text) > _DIGITS or not -_LARGEST <= int(text) < _LARGEST:
        raise ValueError("it holds a whole number beyond 64 bits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("it holds a number too large for a float")
    return value


def _refused(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def _too_deep() -> RequestRefusedError:
    return RequestRefusedError(400, f"the body holds lists or objects more than {_DEEPEST} deep; send flatter JSON")
