"""Numbers as the page shows them. What is not known is an empty text, never 0 and never a dash."""

import math
from datetime import UTC, datetime

from fedtune.recipe.metric_names import LOWER_IS_BETTER

__all__ = [
    "format_change",
    "format_count",
    "format_duration",
    "format_megabytes",
    "format_number",
    "format_score",
    "format_time",
    "shorten_middle",
]

_MINUS = "\N{MINUS SIGN}"


def format_score(value: float | None, name: str = "") -> str:
    """Format a metric: fractions as ``.846``; losses and numbers of 1 and more keep the digit before the point."""
    if value is None or math.isnan(value):
        return ""
    if math.isinf(value):
        return "infinite" if value > 0 else f"{_MINUS}infinite"
    text = f"{abs(value):.3f}" if abs(value) < 1000 else f"{abs(value):.4g}"
    short = text[1:] if text.startswith("0.") and name not in LOWER_IS_BETTER else text
    return f"{_MINUS}{short}" if value < 0 else short


def format_number(value: float | None) -> str:
    """Format a number with three decimals and its leading zero."""
    return format_score(value, "loss")


def format_change(value: float | None, name: str = "") -> str:
    """Format a difference with its sign."""
    text = format_score(value, name)
    return f"+{text}" if text and not text.startswith(_MINUS) else text


def format_count(value: int) -> str:
    """Format a whole number with a comma for thousands."""
    return f"{value:,}"


def format_megabytes(value: float | None) -> str:
    """Format bytes in MB (10^6 bytes) with two decimals."""
    return "" if value is None or math.isnan(value) else f"{value / 1e6:,.2f}"


def format_duration(seconds: float | None) -> str:
    """Format seconds as ``4.2 s``, ``19 min`` or ``6 h 02 min``."""
    if seconds is None or not math.isfinite(seconds):
        return ""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def format_time(moment: datetime | None, now: datetime | None = None) -> str:
    """Format a time in this machine's zone: ``today 09:12``, ``24 Nov 11:20``, or with the year of another year."""
    if moment is None:
        return ""
    local, today = moment.astimezone(), (now or datetime.now(UTC)).astimezone()
    if local.date() == today.date():
        return f"today {local:%H:%M}"
    return f"{local:%d %b %H:%M}" if local.year == today.year else f"{local:%d %b %Y}"


def shorten_middle(text: str, longest: int) -> str:
    """Cut a text in its middle, so that names that differ at their end stay different."""
    if len(text) <= longest:
        return text
    end = (longest - 1) // 2
    return f"{text[: longest - 1 - end]}…{text[-end:]}"
