"""Columns and tables: the plain ones beside arrow's, which must tell the same of the same values."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Array2D, ClassLabel, Dataset, Features, Image, Value

from fedtune.data.arrow import Arrow
from fedtune.data.column import Column, Values, as_picture, concatenate_columns, objects
from fedtune.data.loaded import as_table
from fedtune.data.table import Classes, Greys, Pictures, Table, concatenate

ROWS: dict[str, list[Any]] = {
    "words": ["a", "ü", None, "a", "d"],
    "numbers": [3, 1, 2, 3, 0],
    "shares": [0.5, 1.25, 2.5, 0.5, 8.125],
}


def both(name: str) -> tuple[Column, Column]:
    values = ROWS[name]
    plain = Values(objects(values) if name == "words" else np.array(values))
    return plain, as_table(Dataset.from_dict({name: values})).column(name)


@pytest.mark.parametrize("name", ROWS)
def test_a_plain_column_and_arrows_tell_the_same(name: str) -> None:
    plain, arrow = both(name)
    for column in (plain, arrow):
        assert len(column) == 5
        assert column.values() == ROWS[name]
        assert [column[row] for row in range(5)] == ROWS[name]
        assert column.unique() == list(dict.fromkeys(ROWS[name]))
        assert column.find_missing_row() == (2 if name == "words" else None)
        assert column.nested == ""
        again = column.take(np.array([4, 0, 3])).take(np.array([2, 0]))
        assert again.values() == [ROWS[name][3], ROWS[name][4]]
        assert again[1] == ROWS[name][4]
        assert len(again) == 2


def test_text_of_numbers_is_the_same_in_both() -> None:
    for name in ("numbers", "shares"):
        plain, arrow = both(name)
        assert plain.texts().values() == arrow.texts().values()
    lists = as_table(Dataset.from_dict({"a": [[1], [2]]})).column("a")
    for column in (lists, Values(objects([[1], [2]]))):
        assert column.nested
        with pytest.raises(TypeError, match="is not text"):
            column.texts()


def test_pictures_are_paths_bytes_or_both(tmp_path: Path) -> None:
    expected = [{"bytes": None, "path": "a.png"}, {"bytes": b"x", "path": None}, {"bytes": b"y", "path": "b.png"}]
    plain = Values(objects([Path("a.png"), b"x", {"bytes": b"y", "path": "b.png", "more": 1}])).pictures()
    assert plain.values() == expected
    for values, picture in (
        (["a.png"], expected[0]),
        ([b"x"], expected[1]),
        ([{"bytes": b"y", "path": "b.png"}], expected[2]),
        ([{"path": "a.png"}], expected[0]),
    ):
        column = as_table(Dataset.from_dict({"image": values})).column("image").pictures()
        assert column.values() == [picture]
        assert column.take(np.array([0, 0])).values() == [picture] * 2
    for wrong in ([3], [{"else": 1}]):
        with pytest.raises(TypeError, match="is not an image"):
            as_table(Dataset.from_dict({"image": wrong})).column("image").pictures()
        with pytest.raises(TypeError, match="is not an image"):
            as_picture(wrong[0])


def test_selecting_selects_among_what_was_selected_and_copies_no_column() -> None:
    table = Table({"a": Values(np.arange(10)), "b": Values(objects("abcdefghij"))})
    some = table.select(range(2, 8)).select([5, 0])
    assert (some["a"], some["b"], len(some)) == ([7, 2], ["h", "c"], 2)
    assert some.columns is table.columns
    changed = some.with_column("b", Values(np.array([1, 2])))
    assert (changed["a"], changed["b"], changed.column_names) == ([7, 2], [1, 2], ["a", "b"])
    assert changed.select_columns(["b"]).column_names == ["b"]
    assert concatenate([some, table.select([0])])["b"] == ["h", "c", "a"]
    assert len(table.select([])) == 0
    assert concatenate_columns([Values(np.array([1])), Values(objects(["x"]))]).values() == [1, "x"]


def test_what_datasets_loads_keeps_its_kinds(tmp_path: Path) -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    features = Features(
        {
            "grey": Array2D((3, 4), "uint8"),
            "image": Image(),
            "label": ClassLabel(names=["no", "yes"]),
            "n": Value("int8"),
        }
    )
    rows: dict[str, Any] = {"grey": pixels, "image": ["a.png", "b.png"], "label": [1, 0], "n": [5, 6]}
    loaded = Dataset.from_dict(rows, features=features)
    for table, order in ((as_table(loaded), [0, 1]), (as_table(loaded.select([1, 0])), [1, 0])):
        assert table.kinds == {"grey": Greys(), "image": Pictures(), "label": Classes(("no", "yes"))}
        assert table.select([1]).select_columns(["grey"]).column("grey").values() == [pixels[order[1]].tolist()]
        assert [picture["path"] for picture in table.pictures()] == [rows["image"][row] for row in order]
        assert table["n"] == [rows["n"][row] for row in order]


def test_a_huge_picture_column_is_not_copied_to_be_split() -> None:
    count = 64
    table = Table(
        {"image": Values(objects({"bytes": b"x", "path": None} for _ in range(count)))}, {"image": Pictures()}
    )
    picked = table.select(range(0, count, 2))
    assert sum(1 for _ in picked.pictures()) == count // 2
    assert next(iter(picked.pictures())) is table.column("image")[0]


def test_rows_of_many_chunks_are_those_of_one() -> None:
    words = [f"word {number}" if number % 3 else None for number in range(23)]
    chunks = pa.chunked_array([words[:5], [], words[5:6], words[6:20], words[20:]], pa.string())
    for rows in ([], [0], [4, 5, 6], [5, 5, 19, 20], list(range(23)), [22, 0, 7]):
        found = Arrow(chunks, np.array(rows, np.int64))
        assert found.values() == [words[row] for row in rows]
        assert list(found.iter_values()) == found.values()
