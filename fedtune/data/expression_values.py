"""Computes column expressions on Arrow arrays.

As in SQL, a comparison or a calculation with null is null, and ``and``, ``or`` and ``not`` have three values.
"""

import ast
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fedtune.data.expression_functions import CALLS, MAX_BYTES, count_bytes
from fedtune.data.expression_types import WrongTypeError, get_kind, require_kind
from fedtune.recipe.expressions import column_name

__all__ = ["compute_expression"]

Columns = Mapping[str, pa.Array]
_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}
_CALCULATE: Mapping[type[ast.operator], tuple[str, Callable[[Any, Any], Any]]] = {
    ast.Add: ("+", pc.add_checked),
    ast.Sub: ("-", pc.subtract_checked),
    ast.Mult: ("*", pc.multiply_checked),
    ast.Div: ("/", lambda left, right: pc.divide(pc.cast(left, pa.float64()), pc.cast(right, pa.float64()))),
}


def compute_expression(node: ast.expr, columns: Columns, count: int) -> pa.Array:
    """Return the value of each of ``count`` rows; WrongTypeError or ArrowException for values that do not fit."""
    found = _compute(node, columns)
    return pa.repeat(found, count) if isinstance(found, pa.Scalar) else found


def _compute(node: ast.expr, columns: Columns) -> Any:
    if (name := column_name(node)) is not None:
        return columns[name]
    return _RULES[type(node)](node, columns)


def _constant(node: ast.Constant, _columns: Columns) -> Any:
    return pa.scalar(node.value)


def _both(node: ast.BoolOp, columns: Columns) -> Any:
    word = "and" if isinstance(node.op, ast.And) else "or"
    values = [require_kind(_compute(one, columns), "true or false", one, word) for one in node.values]
    return reduce(pc.and_kleene if word == "and" else pc.or_kleene, values)


def _unary(node: ast.UnaryOp, columns: Columns) -> Any:
    value = _compute(node.operand, columns)
    if isinstance(node.op, ast.Not):
        return pc.invert(require_kind(value, "true or false", node.operand, "not"))
    return pc.negate_checked(require_kind(value, "a number", node.operand, "-"))


def _calculate(node: ast.BinOp, columns: Columns) -> Any:
    left, right = _compute(node.left, columns), _compute(node.right, columns)
    sign, function = _CALCULATE[type(node.op)]
    if sign == "+" and "text" in (get_kind(left), get_kind(right)):
        return _join_texts(require_kind(left, "text", node.left, "+"), require_kind(right, "text", node.right, "+"))
    return function(require_kind(left, "a number", node.left, sign), require_kind(right, "a number", node.right, sign))


def _join_texts(left: Any, right: Any) -> Any:
    rows = max(len(one) if isinstance(one, pa.Array) else 1 for one in (left, right))
    if sum(count_bytes(one) * (1 if isinstance(one, pa.Array) else rows) for one in (left, right)) > MAX_BYTES:
        raise WrongTypeError("+ makes the texts too long; join fewer")
    return pc.binary_join_element_wise(left, right, "", null_handling="emit_null")


def _compare(node: ast.Compare, columns: Columns) -> Any:
    sides = [node.left, *node.comparators]
    pairs = zip(node.ops, sides, sides[1:], strict=False)
    return reduce(pc.and_kleene, [_compare_two(operator, left, right, columns) for operator, left, right in pairs])


def _compare_two(operator: ast.cmpop, left: ast.expr, right: ast.expr, columns: Columns) -> Any:
    if isinstance(right, ast.Constant) and right.value is None:
        return _test_null(operator, _compute(left, columns))
    if isinstance(operator, ast.In | ast.NotIn):
        found = _is_in(left, right, columns)
        return pc.invert(found) if isinstance(operator, ast.NotIn) else found
    first, second = _compute(left, columns), _compute(right, columns)
    kinds = {get_kind(first), get_kind(second)} - {"nothing"}
    if len(kinds) > 1:
        raise WrongTypeError(_describe_difference(left, get_kind(first), right, get_kind(second)))
    if kinds == {"a list"}:
        raise WrongTypeError(
            f"{ast.unparse(left)} is a list, which cannot be compared; use length({ast.unparse(left)})"
        )
    return _COMPARE[type(operator)](first, second)


def _describe_difference(left: ast.expr, first: str, right: ast.expr, second: str) -> str:
    one, other = ast.unparse(left), ast.unparse(right)
    mend = "compare values of one type"
    if {first, second} == {"text", "a number"}:
        mend = f"write number({one if first == 'text' else other}), or put the number in quotes"
    return f"{one} is {first}, and {other} is {second}; {mend}"


def _test_null(operator: ast.cmpop, value: Any) -> Any:
    if isinstance(operator, ast.Is | ast.Eq):
        return pc.is_null(value)
    if isinstance(operator, ast.IsNot | ast.NotEq):
        return pc.is_valid(value)
    raise WrongTypeError("None is neither larger nor smaller than a value; write is None or is not None")


def _is_in(left: ast.expr, right: ast.expr, columns: Columns) -> Any:
    """Membership in a written list, or of a written text in a text."""
    if not isinstance(right, ast.List | ast.Tuple):
        if not (isinstance(left, ast.Constant) and isinstance(left.value, str)):
            raise WrongTypeError(f"in takes a list as ('a', 'b') or a text as 'a' in text; change {ast.unparse(right)}")
        return pc.match_substring(require_kind(_compute(right, columns), "text", right, "in"), pattern=left.value)
    if not right.elts:
        raise WrongTypeError("in has an empty list; write values in it")
    tests = [_compare_two(ast.Eq(), left, one, columns) for one in right.elts]
    return reduce(pc.or_kleene, tests)


def _choose(node: ast.IfExp, columns: Columns) -> Any:
    test = require_kind(_compute(node.test, columns), "true or false", node.test, "if")
    then, other = _compute(node.body, columns), _compute(node.orelse, columns)
    kinds = {get_kind(then), get_kind(other)} - {"nothing"}
    if len(kinds) > 1:
        raise WrongTypeError(_describe_difference(node.body, get_kind(then), node.orelse, get_kind(other)))
    return pc.if_else(pc.fill_null(test, pa.scalar(False)), then, other)


def _call(node: ast.Call, columns: Columns) -> Any:
    assert isinstance(node.func, ast.Name)
    return CALLS[node.func.id]([_compute(one, columns) for one in node.args], node.args)


def _refuse_list(node: ast.expr, _columns: Columns) -> Any:
    raise WrongTypeError(f"the list {ast.unparse(node)} may only stand behind in; use single values elsewhere")


_RULES: Mapping[type[ast.expr], Callable[[Any, Columns], Any]] = {
    ast.BoolOp: _both,
    ast.BinOp: _calculate,
    ast.Call: _call,
    ast.Compare: _compare,
    ast.Constant: _constant,
    ast.IfExp: _choose,
    ast.List: _refuse_list,
    ast.Tuple: _refuse_list,
    ast.UnaryOp: _unary,
}
