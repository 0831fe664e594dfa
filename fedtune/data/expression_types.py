"""The types of values in column expressions, and the sentences about wrong ones."""

import ast
from typing import Any

import pyarrow as pa

__all__ = ["WrongTypeError", "get_kind", "normalise_chunks", "require_kind"]

_MENDS = {("text", "a number"): "number", ("a number", "text"): "text"}
_TYPES = {"text": pa.string(), "a number": pa.float64(), "true or false": pa.bool_()}


class WrongTypeError(Exception):
    """A value has another type than an operator or a function takes. The message says what and how to mend it."""


def get_kind(value: Any) -> str:
    """Return the type of an array or a scalar in words; ``nothing`` if all of it is null."""
    kind = value.type
    if pa.types.is_null(kind):
        return "nothing"
    if pa.types.is_string(kind):
        return "text"
    if pa.types.is_boolean(kind):
        return "true or false"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return "a number"
    return "a list" if pa.types.is_list(kind) or pa.types.is_large_list(kind) else str(kind)


def require_kind(value: Any, wanted: str, node: ast.expr, user: str) -> Any:
    """Return a value of the wanted kind, nulls cast to it; WrongTypeError for another kind."""
    found = get_kind(value)
    if found == "nothing":
        return value.cast(_TYPES[wanted])
    if found == wanted:
        return value
    shown = ast.unparse(node)
    mend = f"write {_MENDS[found, wanted]}({shown})" if (found, wanted) in _MENDS else "use another column"
    raise WrongTypeError(f"{shown} is {found}, and {user} takes {wanted}; {mend}")


def normalise_chunks(chunks: pa.ChunkedArray) -> pa.ChunkedArray:
    """Cast the many types of texts and numbers to the few that expressions know, chunk by chunk."""
    kind = chunks.type
    if pa.types.is_dictionary(kind):
        return normalise_chunks(chunks.cast(kind.value_type))
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return chunks.cast(pa.string())
    if pa.types.is_decimal(kind) or pa.types.is_float16(kind):
        return chunks.cast(pa.float64())
    return chunks
