"""Tables for operators: devices, runs, the audit log."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

import click

from fedtune.untrusted import clean_text

__all__ = [
    "AUDIT",
    "DEVICES",
    "OPERATORS",
    "RUNS",
    "TOKENS",
    "Columns",
    "Row",
    "json_option",
    "print_rows",
    "show_table",
]

Command = TypeVar("Command", bound=Callable[..., Any])
_LONGEST_CELL = 500
Row = dict[str, Any]
Columns = Mapping[str, Callable[[Row], str]]
"""Headings, and the value of a row for each."""


def json_option(command: Command) -> Command:
    """Add the option --json."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for other programs.")(command)


def print_rows(rows: Sequence[Row], columns: Columns, as_json: bool) -> None:
    """Print rows as a table or as JSON; both escape characters that cannot be printed."""
    if as_json:
        from fedtune.json_text import json_text

        click.echo(json_text(rows))
    else:
        show_table(rows, columns)


def show_table(rows: Sequence[Row], columns: Columns) -> None:
    """Print one line per row."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold")
    for heading in columns:
        table.add_column(heading, overflow="fold")
    for row in rows:  # cells quote devices: they are text, not markup
        table.add_row(*(Text(clean_text(cell(row), _LONGEST_CELL)) for cell in columns.values()))
    Console(markup=False, highlight=False).print(table)


def make_text_cell(key: str) -> Callable[[Row], str]:
    return lambda row: str(row[key])


def _time(key: str) -> Callable[[Row], str]:
    return lambda row: f"{datetime.fromisoformat(row[key]).astimezone():%d %b %H:%M:%S}"


def _state(device: Row) -> str:
    if device.get("quarantine_reason"):
        return f"quarantined: {device['quarantine_reason']}"
    return "connected" if device["online"] else "away"


def _memory(device: Row) -> str:
    """Return the memory that a device allows its trainer, and what holds it to that."""
    memory, limit = (device["profile"].get(key) for key in ("memory", "memory_limit"))
    told = f", {limit}" if limit else ""  # older devices do not tell
    return f"{memory // 1_000_000} MB{told}" if isinstance(memory, int) else ""


def _examples(device: Row) -> str:
    """Return the number of a device's own examples. For a partition of a recipe, it depends on the recipe."""
    count = device["profile"].get("examples")
    return "" if count is None else str(count)


def _tags(device: Row) -> str:
    return " ".join(device["tags"])


def _rounds(run: Row) -> str:
    return f"{run['rounds_completed']}/{run['rounds_planned']}"


def _times(line: Row) -> str:
    """Return the number of times, if more than one, and the last time."""
    times = line.get("times", 1)
    return f"{times}, last {_time('last_recorded_at')(line)}" if times > 1 else ""


DEVICES: Columns = {
    "device": make_text_cell("name"),
    "state": _state,
    "memory": _memory,
    "examples": _examples,
    "tags": _tags,
}
RUNS: Columns = {
    "run": make_text_cell("id"),
    "status": make_text_cell("status"),
    "rounds": _rounds,
    "started": _time("created_at"),
    "reason": make_text_cell("reason"),
}
OPERATORS: Columns = {"operator": make_text_cell("name"), "role": make_text_cell("role"), "since": _time("created_at")}
TOKENS: Columns = {
    "token": make_text_cell("token"),
    "for": lambda token: token["device_name"] or "any device",
    "made": _time("created_at"),
    "ends": lambda token: "expired" if token["expired"] else _time("expires_at")(token),
    "tags": _tags,
}
AUDIT: Columns = {
    "at": _time("recorded_at"),
    "outcome": make_text_cell("outcome"),
    "actor": make_text_cell("actor"),
    "message": make_text_cell("message"),
    "times": _times,
}
