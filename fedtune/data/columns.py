"""From a source's own columns to the canonical ones: ``text`` or ``image``, ``label``, ``group``, ``domain``."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Array2D, ClassLabel, Dataset, DatasetInfo, Features, Image, Value
from datasets.table import InMemoryTable

from fedtune.errors import DataError
from fedtune.explain import nearest
from fedtune.recipe import Natural, Recipe

__all__ = ["assemble", "canonical", "split_column"]

Named = dict[str, tuple[str, str]]


def canonical(recipe: Recipe, dataset: Dataset) -> Dataset:
    """The columns the recipe names, renamed; DataError when one is missing or has a null."""
    columns, features = {}, {}
    for name, (key, column) in _named(recipe, dataset.column_names).items():
        stored = _column(recipe.data.source, dataset, key, column)
        try:
            columns[name], features[name] = _convert(name, stored, dataset.features[column])
        except pa.ArrowException as error:
            kind = "pictures" if name == "image" else "text"
            problem = f"column {column!r} holds no {kind}; name another in {key}"
            raise DataError(f"{recipe.data.source}: {problem}") from error
    return assemble(columns, features)


def assemble(columns: Mapping[str, Any], features: Mapping[str, Any]) -> Dataset:
    """A dataset of arrow columns as they are, without copying."""
    typed = Features(features)
    table = pa.table(dict(columns)).replace_schema_metadata(typed.arrow_schema.metadata)
    return Dataset(InMemoryTable(table), info=DatasetInfo(features=typed))


def split_column(recipe: Recipe, by: str) -> str:
    """The canonical name of the source's column ``by``."""
    columns = recipe.data.columns
    return {columns.label: "label", columns.domain: "domain", columns.group: "group"}.get(by, by)


def _named(recipe: Recipe, present: list[str]) -> Named:
    """Canonical name -> (the recipe's key, the source's column)."""
    columns, split = recipe.data.columns, recipe.data.split
    named: Named = {}
    if recipe.task == "image-classification":
        named["image"] = ("data.columns.image", columns.image)
    else:
        named["text"] = ("data.columns.text", columns.text)
    if recipe.task != "causal-language-modelling":
        named["label"] = ("data.columns.label", columns.label)
    group = columns.group or ("group" if recipe.data.source.startswith("sample:") and "group" in present else None)
    if group:
        named["group"] = ("data.columns.group", group)
    if columns.domain:
        named["domain"] = ("data.columns.domain", columns.domain)
    if isinstance(split, Natural):
        named.setdefault(split_column(recipe, split.by), ("data.split.by", split.by))
    return named


def _column(source: str, dataset: Dataset, key: str, column: str) -> Any:
    if column not in dataset.column_names:
        hint = nearest(column, dataset.column_names)
        raise DataError(
            f"{source} has no column {column!r}, which {key} names; {hint}", code="data-columns", counts={"columns": 1}
        )
    stored = dataset.data.table[column]
    if stored.null_count:
        row = pc.index(stored.is_null(), pa.scalar(True)).as_py() + 1
        raise DataError(
            f"{source}: row {row} has no value in column {column!r}; fill it or drop the row",
            code="data-values",
            counts={"rows": stored.null_count},
        )
    return stored


def _convert(name: str, column: Any, feature: Any) -> tuple[Any, Any]:
    """The arrow column and its feature as canonical columns have them; labels are left for later."""
    if name == "label":
        return column, feature
    if name == "image" and isinstance(feature, Array2D | Image):
        return column, feature
    if name == "image":
        return pa.chunked_array([_pictures(chunk) for chunk in column.chunks]), Image()
    if isinstance(feature, ClassLabel):
        return pa.chunked_array([pa.array(feature.names).take(c) for c in column.chunks], pa.string()), Value("string")
    return column.cast(pa.string()), Value("string")


def _pictures(chunk: Any) -> Any:
    """Paths, encoded bytes, or both in a struct, as ``Image`` stores them."""
    if pa.types.is_string(chunk.type) or pa.types.is_binary(chunk.type) or pa.types.is_struct(chunk.type):
        return Image().cast_storage(chunk)
    raise pa.ArrowTypeError(f"{chunk.type} is no picture")
