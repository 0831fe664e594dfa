"""The grid of rounds by clients, and for many clients the grid of rounds by device classes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedtune.tracking import ClientRecord
from fedtune.tracking.run_detail import ClientSums, RoundSums
from fedtune.untrusted import clean_text
from fedtune.web.outcome_words import LETTERS, describe_cell, find_outcome

__all__ = [
    "COLOURS",
    "MOST_CLIENTS",
    "ORDERS",
    "Cell",
    "GridRow",
    "draw_class_rows",
    "draw_client_rows",
    "find_step",
    "sort_clients",
]

MOST_CLIENTS = 64
"""Up to so many clients have a row each."""
_STEPS = 7
COLOURS: Mapping[str, Callable[[ClientRecord], float]] = {
    "loss": lambda record: record.train_loss if record.tells_loss else math.nan,
    "seconds": lambda record: record.seconds,
    "bytes": lambda record: record.bytes_up,
    "memory": lambda record: record.peak_memory or math.nan,
}
"""What cells can be coloured by, besides the outcome."""
ORDERS: Mapping[str, Callable[[ClientSums], tuple[float, ...]]] = {
    "name": lambda one: (one.client,),
    "problems": lambda one: (one.outcomes["merged"] - sum(one.outcomes.values()), one.client),
    "slowest": lambda one: (-one.seconds if math.isfinite(one.seconds) else math.inf, one.client),
}
"""The keys that rows are sorted by."""


@dataclass(frozen=True)
class Cell:
    """A cell: its CSS class, its letter or number, the word for a screen reader, and the line shown on hover."""

    style: str
    text: str = ""
    word: str = ""
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class GridRow:
    """A row: its name, a cell for each round, and what stands at its end. ``link`` opens a device class."""

    name: str
    cells: Sequence[Cell]
    total: str
    link: str = ""


_EMPTY = Cell("none")


def sort_clients(clients: Sequence[ClientSums], order: str) -> list[ClientSums]:
    """Return clients sorted by name, by most problems, or the slowest first."""
    return sorted(clients, key=ORDERS[order])


def draw_client_rows(
    clients: Sequence[ClientSums], records: Sequence[tuple[int, ClientRecord]], rounds: range, colour: str
) -> list[GridRow]:
    """Return a row for each client. ``colour`` is ``status`` or one of :data:`COLOURS`."""
    found = {(number, record.client): record for number, record in records}
    measure = COLOURS.get(colour)
    values = [one for _, record in records if measure and math.isfinite(one := measure(record))]
    limits = (min(values, default=0.0), max(values, default=1.0))

    def draw_cell(number: int, client: int) -> Cell:
        record = found.get((number, client))
        if record is None:
            return _EMPTY
        outcome = find_outcome(record)
        style = _style_measure(measure(record), limits) if measure else f"o-{outcome}"
        return Cell(style, LETTERS.get(outcome, "?"), outcome, describe_cell(number, record))

    return [
        GridRow(
            name=describe_client(one),
            cells=[draw_cell(number, one.client) for number in rounds],
            total=str(one.outcomes["merged"] + one.outcomes["late"]),
        )
        for one in clients
    ]


def draw_class_rows(names: Sequence[str], sums: Mapping[int, RoundSums], rounds: range) -> list[GridRow]:
    """Return a row for each device class: the share of its clients that were not merged, in percent."""
    return [
        GridRow(
            name=clean_text(name) or "no class",
            link=name,
            cells=[_draw_share(name, number, sums) for number in rounds],
            total=str(sum(_count_merged(one.by_class.get(name, {})) for one in sums.values())),
        )
        for name in names
    ]


def find_step(value: float, low: float, high: float) -> int:
    """Return the step of the ramp, from 1 to 7, that a value between ``low`` and ``high`` has."""
    share = (value - low) / (high - low) if high > low else 0.0
    return min(_STEPS, 1 + int(share * _STEPS))


def describe_client(one: ClientSums) -> str:
    """Return the name of a client: its device, or in a simulation its class and number."""
    return clean_text(one.device_name) or f"{clean_text(one.device_class) or 'client'} {one.client}"


def _style_measure(value: float, limits: tuple[float, float]) -> str:
    return f"q{find_step(value, *limits)}" if math.isfinite(value) else "q0"


def _count_merged(outcomes: Mapping[str, int]) -> int:
    """Count merged clients, also those that were merged late."""
    return outcomes.get("merged", 0) + outcomes.get("late", 0)


def _draw_share(name: str, number: int, sums: Mapping[int, RoundSums]) -> Cell:
    outcomes = sums[number].by_class.get(name, {}) if number in sums else {}
    total = sum(outcomes.values())
    if not total:
        return _EMPTY
    share = 100 * (total - _count_merged(outcomes)) / total
    parts = ", ".join(f"{outcomes[word]} {word}" for word in LETTERS if outcomes.get(word))
    title = f"{clean_text(name) or 'no class'}, round {number}: {parts}"
    return Cell(f"q{find_step(share, 0, 100)}", f"{share:.0f}", "percent not merged", title)
