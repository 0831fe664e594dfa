"""Joins one column of several sources, whose types may differ."""

from collections.abc import Sequence

from fedtune.data.column import Column, Values, concatenate_columns, objects
from fedtune.data.table import Classes, ClassLists, Greys, Kind, Pictures
from fedtune.errors import DataError

__all__ = ["align_columns", "join_column"]


def join_column(
    name: str, columns: Sequence[Column], kinds: Sequence[Kind | None], titles: Sequence[str]
) -> tuple[Column, Kind | None]:
    """Join columns after they are aligned."""
    aligned, kind = align_columns(name, columns, kinds, titles)
    return concatenate_columns([column for column in aligned if len(column)] or [aligned[0]]), kind


def align_columns(
    name: str, columns: Sequence[Column], kinds: Sequence[Kind | None], titles: Sequence[str]
) -> tuple[Sequence[Column], Kind | None]:
    """Return columns of one kind. Class numbers of different lists of classes become names.

    Raises DataError for types that do not fit.
    """
    if len(set(kinds)) > 1 and not any(isinstance(kind, Greys | Pictures) for kind in kinds):
        named = zip(columns, kinds, titles, strict=True)
        columns, kinds = [_name_classes(column, kind, title) for column, kind, title in named], [None] * len(columns)
    forms = [_describe_form(name, column, kind) for column, kind in zip(columns, kinds, strict=True)]
    _check_forms(name, [(form, title) for form, title in zip(forms, titles, strict=True) if form])
    return columns, kinds[0]


def _check_forms(name: str, forms: Sequence[tuple[str, str]]) -> None:
    for form, title in forms[1:]:
        if form != forms[0][0]:
            mend = "" if "image" in form else f", e.g. with map: {{{name}: text({name})}}"
            difference = f"{forms[0][0]} in {forms[0][1]} and {form} in {title}"
            raise DataError(f"column {name!r} is {difference}; make them alike{mend}")


def _name_classes(column: Column, kind: Kind | None, title: str) -> Column:
    if isinstance(kind, ClassLists):
        return Values(objects([kind.names[int(one)] for one in row] for row in column.values()))
    if not isinstance(kind, Classes):
        return column
    numbers = column.values()
    if any(number < 0 for number in numbers):
        raise DataError(f"{title} has rows without a class; leave them out, e.g. with filter: label is not None")
    return Values(objects(kind.names[int(number)] for number in numbers))


def _describe_form(name: str, column: Column, kind: Kind | None) -> str:
    """Return what must be the same in all sources, in words; an empty string where nothing must."""
    if isinstance(kind, Pictures):
        return "encoded images"
    if isinstance(kind, Greys) and isinstance(column, Values):
        return f"grey images of {' x '.join(map(str, column.array.shape[1:]))} pixels"
    if name not in ("label", "tags") or not len(column):
        return ""
    value = column[0]
    first = next(iter(value), None) if isinstance(value, list | tuple) else value
    if isinstance(first, bool):
        return "true or false"
    return "text" if isinstance(first, str) else "" if first is None else "numbers"
