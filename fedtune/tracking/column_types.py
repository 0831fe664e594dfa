"""What columns hold beyond what every database agrees on."""

import math
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Boolean, DateTime, Double, Text, TypeDecorator

__all__ = ["Flag", "Measured", "Utc", "Words"]


class Utc(TypeDecorator[datetime]):
    """A moment, kept and returned in UTC also where the database knows no time zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        """To UTC."""
        return value and value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        """From UTC, marked as such."""
        return value and (value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC))


class Measured(TypeDecorator[float]):
    """A float whose "not a number" survives in every database: SQLite has none and keeps it as NULL."""

    impl = Double
    cache_ok = True

    def process_bind_param(self, value: float | None, dialect: Any) -> float | None:
        """A plain float also where NumPy's came in, which SQLite would keep as raw bytes."""
        return None if value is None else float(value)

    def process_result_value(self, value: float | None, dialect: Any) -> float:
        """NULL becomes NaN."""
        return math.nan if value is None else value


class Words(TypeDecorator[tuple[str, ...]]):
    """Words without blanks, in one text; rows from before the column have none."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: tuple[str, ...] | None, dialect: Any) -> str | None:
        """Joined by blanks."""
        return " ".join(value) if value else None

    def process_result_value(self, value: str | None, dialect: Any) -> tuple[str, ...]:
        """Apart again."""
        return tuple((value or "").split())


class Flag(TypeDecorator[bool]):
    """Yes or no; rows from before the column say no."""

    impl = Boolean
    cache_ok = True

    def process_result_value(self, value: bool | None, dialect: Any) -> bool:
        """NULL is no."""
        return bool(value)
