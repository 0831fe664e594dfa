"""One of several sources that are joined into one data set."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pydantic import Field, field_validator

from fedtune.recipe.column_settings import ColumnSettings
from fedtune.recipe.expressions import Expression
from fedtune.recipe.settings_model import SettingsModel

__all__ = ["JoinedSource", "check_encoding", "check_joined_sources", "read_short_form"]


class JoinedSource(SettingsModel):
    """A source with a weight. Its columns, filter, map, delimiter and encoding replace those of ``data``.

    With weight 2 each training example counts twice; with weight 0.5, half of them are drawn with the seed.
    """

    source: str
    weight: float = Field(1.0, gt=0, le=1000, description="copies of each training example; a fraction draws some")
    name: str | None = Field(
        None, min_length=1, max_length=255, description="domain of its examples, if columns.domain names none"
    )
    columns: ColumnSettings | None = None
    filter: Expression | None = None
    map: dict[str, Expression] | None = Field(None, min_length=1, max_length=64)
    delimiter: str | None = Field(None, min_length=1, max_length=1)
    encoding: str | None = None

    @field_validator("encoding")
    @classmethod
    def _of_text(cls, value: str | None) -> str | None:
        return check_encoding(value)


def check_encoding(value: str | None) -> str | None:
    """Return the name of a text encoding; ValueError for any other."""
    try:
        "".encode(value or "utf-8")
    except (LookupError, UnicodeError) as error:
        raise ValueError(f"{value!r} is not a text encoding; write e.g. cp1252") from error
    return value


def read_short_form(value: Any) -> Any:
    """Read a list in which a source without settings is a string."""
    return [{"source": one} if isinstance(one, str) else one for one in value] if isinstance(value, list) else value


def check_joined_sources(sources: Sequence[JoinedSource]) -> None:
    """ValueError when some sources have a name and others none, or two have the same."""
    names = [source.name for source in sources]
    if any(names) and None in names:
        nameless = sources[names.index(None)].source
        raise ValueError(f"sources: {nameless} has no name, as others have; name all sources or none")
    name, count = Counter(names).most_common(1)[0] if any(names) else (None, 1)
    if count > 1:
        raise ValueError(f"sources: two are called {name!r}; name them apart")
