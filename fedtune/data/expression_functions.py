"""The functions of column expressions, on Arrow arrays and scalars.

Each takes its arguments as values, and their nodes for messages. A null gives a null. Regular expressions are RE2's,
which take linear time.
"""

import ast
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fedtune.data.expression_types import WrongTypeError, get_kind, require_kind

__all__ = ["CALLS", "MAX_BYTES", "count_bytes"]

MAX_BYTES = 1 << 28
"""The most bytes of text that the rows computed together may grow to."""
Nodes = Sequence[ast.expr]
Call = Callable[[Sequence[Any], Nodes], Any]


def count_bytes(value: Any) -> int:
    """Return the bytes of an array's values, or of a scalar's text."""
    return int(value.nbytes) if isinstance(value, pa.Array) else len(str(value.as_py()).encode(errors="replace"))


def _of_kind(wanted: str, name: str, function: Callable[[Any], Any], values: Sequence[Any], nodes: Nodes) -> Any:
    return function(require_kind(values[0], wanted, nodes[0], name))


def _search(name: str, function: Callable[..., Any], values: Sequence[Any], nodes: Nodes) -> Any:
    return function(require_kind(values[0], "text", nodes[0], name), pattern=values[1].as_py())


def _measure_length(values: Sequence[Any], nodes: Nodes) -> Any:
    """Characters of a text, or elements of a list."""
    if get_kind(values[0]) == "a list":
        return pc.cast(pc.list_value_length(values[0]), pa.int64())
    return pc.cast(pc.utf8_length(require_kind(values[0], "text", nodes[0], "length")), pa.int64())


def _to_text(values: Sequence[Any], nodes: Nodes) -> Any:
    if pa.types.is_nested(values[0].type) or pa.types.is_binary(values[0].type):
        raise WrongTypeError(f"{ast.unparse(nodes[0])} is {get_kind(values[0])}, which is no text; use another column")
    return pc.cast(values[0], pa.string())


def _to_number(values: Sequence[Any], nodes: Nodes) -> Any:
    kind = get_kind(values[0])
    if kind not in ("text", "a number", "true or false", "nothing"):
        raise WrongTypeError(f"{ast.unparse(nodes[0])} is {kind}, which is no number; use another column")
    return pc.cast(pc.utf8_trim_whitespace(values[0]) if kind == "text" else values[0], pa.float64())


def _replace(values: Sequence[Any], nodes: Nodes) -> Any:
    source = require_kind(values[0], "text", nodes[0], "replace")
    old, new = values[1].as_py(), values[2].as_py()
    if not old:
        raise WrongTypeError("replace looks for an empty text; write what to replace")
    if count_bytes(source) * max(1, len(new.encode()) // len(old.encode()) + 1) > MAX_BYTES:
        raise WrongTypeError("replace may make the texts too long; write a shorter replacement")
    return pc.replace_substring(source, pattern=old, replacement=new)


def _coalesce(values: Sequence[Any], nodes: Nodes) -> Any:
    """The first value that is not null."""
    kinds = [get_kind(value) for value in values]
    wanted = next((kind for kind in kinds if kind != "nothing"), "text")
    return pc.coalesce(*(require_kind(one, wanted, node, "coalesce") for one, node in zip(values, nodes, strict=True)))


CALLS: Mapping[str, Call] = {
    "abs": partial(_of_kind, "a number", "abs", pc.abs_checked),
    "coalesce": _coalesce,
    "contains": partial(_search, "contains", pc.match_substring),
    "ends_with": partial(_search, "ends_with", pc.ends_with),
    "length": _measure_length,
    "lower": partial(_of_kind, "text", "lower", pc.utf8_lower),
    "matches": partial(_search, "matches", pc.match_substring_regex),
    "number": _to_number,
    "replace": _replace,
    "round": partial(_of_kind, "a number", "round", pc.round),
    "starts_with": partial(_search, "starts_with", pc.starts_with),
    "text": _to_text,
    "trim": partial(_of_kind, "text", "trim", pc.utf8_trim_whitespace),
    "upper": partial(_of_kind, "text", "upper", pc.utf8_upper),
}
