"""Column expressions of a recipe: Python's syntax, a few functions, and nothing that could run code.

The text is parsed by :mod:`ast` and never compiled. Only the syntax listed here is accepted. Names are columns;
``column("my name")`` is a column whose name is no Python name. :mod:`fedtune.data.expression_values` computes them.
"""

import ast
import re
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Annotated

from pydantic import AfterValidator

from fedtune.recipe.validation_errors import suggest_nearest

__all__ = ["FUNCTIONS", "Expression", "column_name", "list_columns", "parse_expression", "quote_expression"]

FUNCTIONS: Mapping[str, tuple[int, int]] = {
    "abs": (1, 1),
    "coalesce": (2, 8),
    "column": (1, 1),
    "contains": (2, 2),
    "ends_with": (2, 2),
    "length": (1, 1),
    "lower": (1, 1),
    "matches": (2, 2),
    "number": (1, 1),
    "replace": (3, 3),
    "round": (1, 1),
    "starts_with": (2, 2),
    "text": (1, 1),
    "trim": (1, 1),
    "upper": (1, 1),
}
"""The fewest and the most arguments of each function."""
_LITERAL_AFTER_FIRST = frozenset({"contains", "ends_with", "matches", "replace", "starts_with"})
MAX_CHARACTERS = 2000
MAX_PARTS = 200
MAX_DEPTH = 40
_OPERATORS = (ast.And, ast.Or, ast.Not, ast.USub, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Load)
_COMPARISONS = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn, ast.Is, ast.IsNot)
_NODES = (
    *(ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.Compare, ast.Call, ast.IfExp, ast.Constant, ast.Name, ast.List),
    *(ast.Tuple, *_OPERATORS, *_COMPARISONS),
)
_NAMES = {
    ast.Attribute: "a dot; write functions as length(text)",
    ast.Subscript: "square brackets; name a whole column",
    ast.JoinedStr: "an f-string; join texts with +",
    ast.Pow: "**; use + - * /",
    ast.BitAnd: "&; write and",
    ast.BitOr: "|; write or",
    ast.Invert: "~; write not",
    ast.NamedExpr: ":=; compare with ==",
}
"""What is refused, in words, and the mend."""
_HINTS = {
    r"\b(AND|OR|NOT|IN|IS)\b": "write and, or, not, in and is in small letters",
    r"<>": "write !=",
    r"\|\|": "join texts with +",
    r"(?<![=!<>])=(?!=)": "compare with ==",
    r"(?i)\blike\b": "write contains(column, 'part')",
}
"""What people write who know SQL, and what to write instead."""
_STRING_OR_BREAK = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|[\r\n]", re.DOTALL)
_LONGEST_QUOTE = 80
_INTEGERS = 1 << 63


@lru_cache(maxsize=256)
def parse_expression(text: str) -> ast.expr:
    """Return the syntax tree of an expression; ValueError in one sentence for anything that is not allowed."""
    quoted = quote_expression(text)
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{quoted} has {len(text)} characters, and {MAX_CHARACTERS} are allowed; shorten it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of odd strings and comparisons
            found = ast.parse(_join_lines(text).strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        hint = next((mend for pattern, mend in _HINTS.items() if re.search(pattern, _blank_strings(text))), None)
        reason = error.msg if isinstance(error, SyntaxError) else "it is nested too deeply or has an odd character"
        raise ValueError(f"{quoted} is no expression ({reason}); {hint or 'check its quotes and brackets'}") from error
    _check_size(found, quoted)
    for node in ast.walk(found):
        _check_node(node, quoted)
    return found


def quote_expression(text: str) -> str:
    """Return an expression as messages show it: quoted and cut."""
    return repr(text if len(text) <= _LONGEST_QUOTE else text[: _LONGEST_QUOTE - 1] + "…")


def list_columns(text: str) -> list[str]:
    """Return the names of the columns that an expression reads."""
    found = (column_name(node) for node in _walk_values(parse_expression(text)))
    return list(dict.fromkeys(name for name in found if name is not None))


def column_name(node: ast.AST) -> str | None:
    """Return the name of the column that a node stands for, or None."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "column":
        return str(node.args[0].value) if isinstance(node.args[0], ast.Constant) else None
    return None


def _walk_values(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below a node, without the names of functions."""
    yield node
    below = node.args if isinstance(node, ast.Call) else ast.iter_child_nodes(node)
    for child in below:
        yield from _walk_values(child)


def _join_lines(text: str) -> str:
    """Line breaks inside quotes as ``\\n``, others as blanks: in YAML's double quotes, ``\\n`` is a line break."""
    escaped = {"\n": "\\n", "\r": "\\r"}
    return _STRING_OR_BREAK.sub(
        lambda found: " " if found[0] in escaped else re.sub(r"[\r\n]", lambda one: escaped[one[0]], found[0]), text
    )


def _blank_strings(text: str) -> str:
    return _STRING_OR_BREAK.sub("''", text)


def _check_size(found: ast.expr, quoted: str) -> None:
    level: list[ast.AST] = [found]
    parts = depth = 0
    while level:
        parts, depth = parts + len(level), depth + 1
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    if depth > MAX_DEPTH or parts > MAX_PARTS * 2:
        raise ValueError(f"{quoted} is too long or nested too deeply; write it in several entries of map")


def _check_node(node: ast.AST, quoted: str) -> None:
    if not isinstance(node, _NODES):
        raise ValueError(f"{quoted} uses {_NAMES.get(type(node)) or _unknown(node)}")
    if isinstance(node, ast.Constant):
        _check_constant(node.value, quoted)
    elif isinstance(node, ast.Call):
        _check_call(node, quoted)
    elif isinstance(node, ast.Compare):
        _check_comparison(node, quoted)
    elif isinstance(node, ast.Name) and node.id.startswith("__"):
        raise ValueError(f"{quoted} names {node.id}, which is no column; write column('{node.id}') if it is one")


def _unknown(node: ast.AST) -> str:
    return f"{type(node).__name__}, which is not allowed; use columns, and, or, not, comparisons, + - * / and functions"


def _check_constant(value: object, quoted: str) -> None:
    if not isinstance(value, str | int | float | None):
        raise ValueError(f"{quoted} has a value that is no text and no number; write 'text' or 1.5")
    if isinstance(value, int) and not -_INTEGERS <= value < _INTEGERS:
        raise ValueError(f"{quoted} has a number beyond 64 bits; write a smaller one")
    if isinstance(value, float) and abs(value) == float("inf"):
        raise ValueError(f"{quoted} has a number that is infinite; write a smaller one")


def _check_call(node: ast.Call, quoted: str) -> None:
    if isinstance(node.func, ast.Attribute):
        raise ValueError(f"{quoted} uses {_NAMES[ast.Attribute]}")
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    if name not in FUNCTIONS:
        raise ValueError(f"{quoted} calls {name or 'a value'}, not a function; {suggest_nearest(name, [*FUNCTIONS])}")
    fewest, most = FUNCTIONS[name]
    if node.keywords or not fewest <= len(node.args) <= most:
        wanted = str(fewest) if fewest == most else f"{fewest} to {most}"
        raise ValueError(f"{quoted}: {name} takes {wanted} arguments without names; write them in order")
    if name == "column" and not _is_text(node.args[0]):
        raise ValueError(f"{quoted}: column takes a name in quotes; write column('my name')")
    if name in _LITERAL_AFTER_FIRST and not all(map(_is_text, node.args[1:])):
        raise ValueError(f"{quoted}: {name} takes a column and texts in quotes; write {name}(text, 'part')")


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _check_comparison(node: ast.Compare, quoted: str) -> None:
    for operator, right in zip(node.ops, node.comparators, strict=True):
        if isinstance(operator, ast.Is | ast.IsNot) and not (isinstance(right, ast.Constant) and right.value is None):
            raise ValueError(f"{quoted} compares with is; write == or !=, and is only before None")


def _check_expression(text: str) -> str:
    parse_expression(text)
    return text


Expression = Annotated[str, AfterValidator(_check_expression)]
"""A setting that is a column expression."""
