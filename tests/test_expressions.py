"""Column expressions give what pandas gives, and refuse everything that is no column expression, quickly."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from fedtune.data.expression_functions import CALLS
from fedtune.data.expression_types import WrongTypeError, normalise_chunks
from fedtune.data.expression_values import compute_expression
from fedtune.recipe.expressions import FUNCTIONS, list_columns, parse_expression

WORDS = ["good", "bad", "Neutral film", "", "ÜBER 9", "a longer text here", None]


def frame(seed: int, rows: int = 700) -> pd.DataFrame:
    """A random table with nulls in every column."""
    rng = np.random.default_rng(seed)
    numbers = pd.array(rng.integers(-3, 9, rows), dtype="Int64")
    numbers[rng.random(rows) < 0.2] = pd.NA
    floats = pd.array(rng.normal(size=rows).round(1), dtype="Float64")
    floats[rng.random(rows) < 0.2] = pd.NA
    flags = pd.array(rng.random(rows) < 0.5, dtype="boolean")
    flags[rng.random(rows) < 0.2] = pd.NA
    texts = {name: pd.array(rng.choice(np.array(WORDS, object), rows), dtype="string") for name in ("text", "other")}
    return pd.DataFrame({**texts, "n": numbers, "x": floats, "flag": flags})


def compute(expression: str, table: pd.DataFrame) -> list[object]:
    chunks = {name: normalise_chunks(pa.chunked_array([pa.array(table[name])])) for name in table.columns}
    columns = {name: found.combine_chunks() for name, found in chunks.items()}
    found: list[object] = compute_expression(parse_expression(expression), columns, len(table)).to_pylist()
    return found


@pytest.mark.parametrize(
    ("expression", "oracle"),
    [
        ("text != 'bad' and length(text) > 3", lambda d: (d.text != "bad") & (d.text.str.len() > 3)),
        ("n > 2 or x < 0", lambda d: (d.n > 2) | (d.x < 0)),
        ("not (flag or n == 1)", lambda d: ~(d.flag | (d.n == 1))),
        ("0 <= n < 5", lambda d: (d.n >= 0) & (d.n < 5)),
        ("text in ('good', 'bad')", lambda d: (d.text == "good") | (d.text == "bad")),
        ("n not in [1, 2]", lambda d: (d.n != 1) & (d.n != 2)),
        ("'o' in text", lambda d: d.text.str.contains("o", regex=False)),
        ("contains(lower(text), 'über')", lambda d: d.text.str.lower().str.contains("über", regex=False)),
        ("starts_with(text, 'a') or ends_with(text, 'm')", lambda d: d.text.str.match("a") | d.text.str.endswith("m")),
        ("matches(text, '[0-9]$')", lambda d: d.text.str.contains("[0-9]$")),
        ("text is None", lambda d: d.text.isna()),
        ("text is not None and other == text", lambda d: d.text.notna() & (d.other == d.text)),
        ("n * 2 - x > 1.5", lambda d: (d.n * 2 - d.x) > 1.5),
        ("abs(n) + -1 >= x / 2", lambda d: (d.n.abs() - 1) >= d.x / 2),
        ("text + ' ' + other", lambda d: d.text + " " + d.other),
        ("coalesce(text, other, '-')", lambda d: d.text.fillna(d.other).fillna("-")),
        ("upper(trim(replace(text, 'o', ' oo ')))", lambda d: d.text.str.replace("o", " oo ").str.strip().str.upper()),
        ("number(text(n)) + 1", lambda d: d.n.astype("Float64") + 1),
        ("length(text + 'ab')", lambda d: d.text.str.len() + 2),
    ],
)
def test_values_are_those_of_pandas(expression: str, oracle: Callable[[pd.DataFrame], "pd.Series[object]"]) -> None:
    for seed in range(5):
        table = frame(seed)
        wanted = [None if value is pd.NA else value for value in oracle(table).tolist()]
        assert compute(expression, table) == wanted


def test_a_choice_takes_the_other_value_where_its_condition_is_null() -> None:
    table = frame(1)
    wanted = ["many" if value is not pd.NA and value > 3 else "few" for value in table.n]
    assert compute("'many' if n > 3 else 'few'", table) == wanted


def test_every_function_is_computed() -> None:
    assert CALLS.keys() == FUNCTIONS.keys() - {"column"}


def test_columns_are_found_and_functions_are_none() -> None:
    assert list_columns("length(a) > 3 and column('b c') in (d, 'e') and a != None") == ["a", "b c", "d"]


@pytest.mark.parametrize("text", ["'a\nb' + text", "'a\\nb'\n  + text"])
def test_a_line_break_may_stand_in_quotes_and_between_words(text: str) -> None:
    assert compute_expression(parse_expression(text), {"text": pa.array(["c"])}, 1).to_pylist() == ["a\nbc"]


HOSTILE = [
    ("text.__class__.__mro__", "uses a dot"),
    ("().__class__.__bases__[0].__subclasses__()", "uses a dot"),
    ("__import__('os').system('true')", "uses a dot"),
    ("eval('1')", "calls eval"),
    ("__builtins__", "names __builtins__"),
    ("9 ** 9 ** 9 ** 9", r"uses \*\*"),
    ("1 << 99999999999", "uses BinOp|uses LShift"),
    ("(" * 1000 + "1" + ")" * 1000, "characters, and 2000 are allowed"),
    ("(" * 900 + "1" + ")" * 900, "is no expression"),
    ("-" * 1900 + "1", "nested too deeply"),
    ("not " * 450 + "flag", "nested too deeply"),
    ("'" + "a" * 10_000_000 + "'", "characters, and 2000 are allowed"),
    ("[x for x in text for y in text]", "uses ListComp"),
    ("(lambda: text)()", "calls a value"),
    ("f'{text!r:>99999999}'", "uses an f-string"),
    ("text[::2]", "uses square brackets"),
    ("(a := 1)", "uses :="),
    ("9" * 1000, "beyond 64 bits"),
    ("1e999", "infinite"),
    ("text; import os", "is no expression"),
    ("\x00", "is no expression"),
    ("\ud800", "is no expression"),
    ("contains(text, other)", "texts in quotes"),
    ("length(text, key=1)", "arguments without names"),
    ("length(*text)", "not allowed"),
    ("a + " * 300 + "a", "nested too deeply"),
    ("label = 'x'", "compare with =="),
    ("a = 1 AND b = 2", "small letters"),
    ("a <> 1", "write !="),
    ("a | b", "write or"),
    ("", "is no expression"),
    ("lenght(text)", "did you mean 'length'"),
]


@pytest.mark.parametrize(("text", "problem"), HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_no_column_expression_is_refused_quickly(text: str, problem: str) -> None:
    started = time.process_time()
    with pytest.raises(ValueError, match=problem) as caught:
        parse_expression(text)
    assert time.process_time() - started < 2
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("'a' * 10000000", "takes a number; write number"),
        ("n > 'a'", "put the number in quotes"),
        ("text > 3", r"write number\(text\)"),
        ("text + n", r"write text\(n\)"),
        ("n and flag", "takes true or false"),
        ("length(n)", r"write text\(n\)"),
        ("n < None", "write is None"),
        ("n in text", "in takes a list"),
        ("(n, 1)", "may only stand behind in"),
    ],
)
def test_a_wrong_type_says_what_to_write(text: str, problem: str) -> None:
    with pytest.raises(WrongTypeError, match=problem):
        compute(text, frame(0, 3))


def test_texts_that_would_grow_without_end_are_refused() -> None:
    grown = "replace(" * 12 + "text" + ", 'a', 'aaaaaaaaaa')" * 12
    started = time.process_time()
    with pytest.raises(WrongTypeError, match="too long"):
        compute_expression(parse_expression(grown), {"text": pa.array(["a" * 50])}, 1)
    assert time.process_time() - started < 30


def test_the_documentation_lists_every_function() -> None:
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)\(", row)} == FUNCTIONS.keys()
