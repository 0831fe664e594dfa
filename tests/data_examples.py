"""Small recipes and data sets the tests of the data room share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.data import Table, Values
from fedtune.recipe.schema import Recipe
from fedtune.recipe.yaml_file import parse_recipe

__all__ = ["ROWS", "TEXT", "a_recipe", "csv_file", "labelled", "rows_of"]

ROWS = [f"text {row},{'no' if row % 2 else 'yes'},author {row % 20}" for row in range(200)]

TEXT = """
version: 2
name: example
task: text-classification
model: {source: "path:nowhere"}
data: {source: "sample:sentiment"}
devices: [{name: phone, count: 4}]
train: {local_steps: 1, max_length: 8, image_size: 16}
federation: {rounds: 1}
"""


def a_recipe(*overrides: str, clients: int = 4) -> Recipe:
    return parse_recipe(TEXT, "example", [f"devices=[{{name: phone, count: {clients}}}]", *overrides])


def labelled(examples: int, classes: int = 2, group_size: int = 1) -> Table:
    """Examples with labels in turn; so many neighbours share a group and, in threes, a domain."""
    rows = range(examples)
    columns = {
        "text": [f"text {row}" for row in rows],
        "label": [row // group_size % classes for row in rows],
        "group": [f"g{row // group_size:04}" for row in rows],
        "domain": ["abc"[row // group_size % 3] for row in rows],
    }
    return Table({name: Values(np.array(values)) for name, values in columns.items()})


def rows_of(table: Table) -> Iterator[dict[str, Any]]:
    """The rows as Python has them."""
    columns = [table[name] for name in table.column_names]
    yield from (dict(zip(table.column_names, values, strict=True)) for values in zip(*columns, strict=True))


def csv_file(path: Path, heading: str, *rows: str) -> str:
    """The data source of a CSV file with these lines."""
    path.write_text("\n".join([heading, *rows]) + "\n", encoding="utf-8")
    return f"data.source=csv:{path}"
