"""What a server tells its operators, as tables: devices, runs, the audit."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

__all__ = ["AUDIT", "DEVICES", "RUNS", "Columns", "Row", "show"]

Row = dict[str, Any]
Columns = Mapping[str, Callable[[Row], str]]
"""Headings, and what a row has below each."""


def show(rows: Sequence[Row], columns: Columns) -> None:
    """One line per row."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for heading in columns:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    Console().print(table)


def _told(key: str) -> Callable[[Row], str]:
    return lambda row: str(row[key])


def _time(key: str) -> Callable[[Row], str]:
    return lambda row: f"{datetime.fromisoformat(row[key]).astimezone():%d %b %H:%M:%S}"


def _state(device: Row) -> str:
    if device.get("quarantined"):
        return f"quarantined: {device['quarantined']}"
    return "connected" if device["online"] else "away"


def _memory(device: Row) -> str:
    memory = device["profile"].get("memory")
    return f"{memory / 1e6:.0f} MB" if isinstance(memory, int | float) else ""


def _examples(device: Row) -> str:
    """How many a device holds of its own; with a part of a recipe's split that depends on the recipe."""
    count = device["profile"].get("examples")
    return "" if count is None else str(count)


def _tags(device: Row) -> str:
    return " ".join(device["tags"])


def _rounds(run: Row) -> str:
    return f"{run['rounds_completed']}/{run['rounds_planned']}"


DEVICES: Columns = {
    "device": _told("name"),
    "state": _state,
    "memory": _memory,
    "examples": _examples,
    "tags": _tags,
}
RUNS: Columns = {
    "run": _told("id"),
    "status": _told("status"),
    "rounds": _rounds,
    "started": _time("created"),
    "reason": _told("reason"),
}
AUDIT: Columns = {"at": _time("at"), "kind": _told("kind"), "who": _told("who"), "what": _told("what")}
