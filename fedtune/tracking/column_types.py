"""Column types that mean the same in every database."""

import json
import math
import re
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Boolean, DateTime, Double, Text, TypeDecorator

__all__ = ["AnyText", "Flag", "Measured", "Names", "Utc", "Words"]


_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


class Utc(TypeDecorator[datetime]):
    """A time in UTC, also in a database without time zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        """Convert to UTC."""
        return value and value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        """Return a time that has the zone UTC."""
        return value and (value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC))


class Measured(TypeDecorator[float]):
    """A float or NaN. NULL stands for NaN, because SQLite cannot store it."""

    impl = Double
    cache_ok = True

    def process_bind_param(self, value: float | None, dialect: Any) -> float | None:
        """Convert NumPy's floats, which SQLite would store as raw bytes."""
        return None if value is None else float(value)

    def process_result_value(self, value: float | None, dialect: Any) -> float:
        """Return NaN for NULL."""
        return math.nan if value is None else value


class Words(TypeDecorator[tuple[str, ...]]):
    """Words without blanks, stored as one text. Rows that are older than the column have none."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: tuple[str, ...] | None, dialect: Any) -> str | None:
        """Join the words with blanks."""
        return " ".join(value) if value else None

    def process_result_value(self, value: str | None, dialect: Any) -> tuple[str, ...]:
        """Split the text into its words."""
        return tuple((value or "").split())


class Names(TypeDecorator[tuple[str, ...]]):
    """Names that may contain blanks, stored as a JSON list."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: tuple[str, ...] | None, dialect: Any) -> str | None:
        """Write the names as ASCII, which every database takes."""
        return json.dumps(value) if value else None

    def process_result_value(self, value: str | None, dialect: Any) -> tuple[str, ...]:
        """Read the list."""
        return tuple(json.loads(value)) if value else ()


class AnyText(TypeDecorator[str]):
    """Text of any origin. U+FFFD replaces what a database refuses: U+0000 (PostgreSQL) and lone surrogates."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        """Replace the characters that cannot be stored."""
        return value and _UNSTORABLE.sub("\ufffd", value)


class Flag(TypeDecorator[bool]):
    """True or False. Rows that are older than the column are False."""

    impl = Boolean
    cache_ok = True

    def process_result_value(self, value: bool | None, dialect: Any) -> bool:
        """Return False for NULL."""
        return bool(value)
