"""The output of ``fedtune profile``: its progress, and a table that fits 80 columns."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedtune.profiling import FailedProfile, ProfileResult, StepProfile
from fedtune.recipe.schema import Recipe

__all__ = ["make_result_dicts", "make_title", "show_profile", "show_profile_progress"]

_NAME = 18
"""Longest name of a technique in a table of 80 columns."""

Shown = tuple[Callable[[str], None], Callable[[ProfileResult], None]]


@contextmanager
def show_profile_progress(cases: int) -> Iterator[Shown]:
    """Show progress on standard error. Yield the functions to call when a case begins and when it ends."""
    console = Console(stderr=True, markup=False, highlight=False)
    live = console.is_terminal and not console.is_dumb_terminal
    with _live(console, cases) if live else _plain(console, cases) as shown:
        yield shown


@contextmanager
def _plain(console: Console, cases: int) -> Iterator[Shown]:
    started, done = time.monotonic(), []

    def end(row: ProfileResult) -> None:
        done.append(row)
        line = f"{len(done)}/{cases}  {_line(row)}  {_left(started, len(done), cases)}"
        print(line, file=console.file, flush=True)

    yield lambda _: None, end


@contextmanager
def _live(console: Console, cases: int) -> Iterator[Shown]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    started, done = time.monotonic(), []
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task("", total=cases, note="")

        def end(row: ProfileResult) -> None:
            done.append(row)
            bars.update(bar, completed=len(done), note=_left(started, len(done), cases))
            bars.console.print(_line(row), highlight=False)

        yield lambda technique: bars.update(bar, description=technique), end


def _left(started: float, done: int, cases: int) -> str:
    left = round((time.monotonic() - started) / done * (cases - done))
    return f"{left // 60}:{left % 60:02} left"


def _line(row: ProfileResult) -> str:
    if isinstance(row, FailedProfile):
        return f"{row.technique}: {row.error}"
    return f"{row.technique}: {_size(row.kept_bytes)} kept, {_size(row.peak_bytes)} peak, {row.seconds:.2f} s"


def make_title(recipe: Recipe, random: bool) -> str:
    """Describe in one line what was measured."""
    train = recipe.train
    from fedtune.tasks import get_task  # imports torch

    side = get_task(recipe.task).describe_input_size(train)
    inputs = f"random inputs from seed {recipe.seed}" if random else f"the first batch of {recipe.data.title}"
    return f"{recipe.model.source}, {train.batch_size} x {side}, {inputs}"


def make_result_dicts(rows: Sequence[ProfileResult]) -> list[dict[str, Any]]:
    """Return one object per case; ``gradient_error`` only if gradients were checked, ``error`` if the case failed."""
    objects = [_as_object(row) for row in rows]
    unchecked = all(one["gradient_error"] is None for one in objects)
    return [
        {key: value for key, value in one.items() if not (unchecked and key == "gradient_error")} for one in objects
    ]


def _as_object(row: ProfileResult) -> dict[str, Any]:
    return dict.fromkeys(field.name for field in fields(StepProfile)) | asdict(row)


def show_profile(rows: Sequence[ProfileResult], heading: str) -> None:
    """Print the table, what its columns mean, and why cases failed."""
    console = Console(markup=False, highlight=False)
    console.print(_table(rows, heading))
    for line in _notes(rows):
        console.print(line, soft_wrap=True)


def _table(rows: Sequence[ProfileResult], heading: str) -> Table:
    figures = [row for row in rows if isinstance(row, StepProfile)]
    columns = ["kept", "peak", *_name_process_columns(rows), "time", "trained", "up", "down"]
    columns += ["error"] if any(row.gradient_error is not None for row in figures) else []
    look: dict[str, Any] = {"box": None, "padding": (0, 1, 0, 0), "pad_edge": False, "header_style": "bold"}
    table = Table(title=heading, title_justify="left", **look)
    table.add_column("technique", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = _cells(row, _full_seconds(rows)) if isinstance(row, StepProfile) else ["-"] * len(columns)
        table.add_row(_folded(row.technique), *cells[: len(columns)])
    return table


def _cells(row: StepProfile, full: float | None) -> list[str]:
    sizes = row.kept_bytes, row.peak_bytes, *_process_sizes(row)
    time_taken = f"{row.seconds / full:.2f}x" if full else f"{row.seconds:.3g} s"
    error = "-" if row.gradient_error is None else f"{row.gradient_error:.0e}" if row.gradient_error else "0"
    return [*map(_size, sizes), time_taken, _short(row.trainable), *map(_size, (row.wire_bytes, row.down_bytes)), error]


def _notes(rows: Sequence[ProfileResult]) -> Iterator[str]:
    yield "kept: activation memory for backward; peak: of the step; both without parameters and their gradients"
    yield from _describe_process(rows)
    yield "up, down: sent per round"
    yield from _describe_accelerator(rows)
    if full := _full_seconds(rows):
        yield f"time: of a whole step, relative to {full:.3g} s of full"
    for row in rows:
        if isinstance(row, FailedProfile):
            yield f"{row.technique} did not run: {row.error}"


def _name_process_columns(rows: Sequence[ProfileResult]) -> list[str]:
    """Return the columns of the process's memory: its two parts if the system tells them apart."""
    return ["RSS", "+RSS"] if _find_allocator(rows) is None else ["anon", "file", "+anon"]


def _process_sizes(row: StepProfile) -> list[int]:
    if row.anonymous_bytes is None or row.file_bytes is None or row.loaded_anonymous_bytes is None:
        return [row.rss_bytes, row.rss_bytes - row.loaded_bytes]
    return [row.anonymous_bytes, row.file_bytes, row.anonymous_bytes - row.loaded_anonymous_bytes]


def _describe_process(rows: Sequence[ProfileResult]) -> Iterator[str]:
    if (allocator := _find_allocator(rows)) is None:
        yield "RSS: peak of the process; +RSS: above its memory with the model loaded"
        return
    yield "anon: peak anonymous memory of the process; +anon: above that with the model loaded"
    yield "file: its pages of files, such as libraries and weights, which the system can take back"
    if allocator:
        yield f"allocator: {allocator}"


def _find_allocator(rows: Sequence[ProfileResult]) -> str | None:
    """Return the allocator of the cases; None if the system does not tell their anonymous memory apart."""
    told = (row for row in rows if isinstance(row, StepProfile) and row.anonymous_bytes is not None)
    return next((row.allocator for row in told), None)


def _describe_accelerator(rows: Sequence[ProfileResult]) -> Iterator[str]:
    """Say on which accelerator the cases ran, and torch's own peaks of its memory."""
    for row in rows:
        if isinstance(row, StepProfile) and row.device_type != "cpu":
            peaks = row.accelerator_bytes, row.accelerator_reserved_bytes
            told = [
                f"{_size(peak)} {name}" for name, peak in zip(("allocated", "reserved"), peaks, strict=True) if peak
            ]
            yield f"{row.technique} on {row.device_type}: {', '.join(told) or 'torch counts no peak'}"


def _full_seconds(rows: Sequence[ProfileResult]) -> float | None:
    return next((row.seconds for row in rows if isinstance(row, StepProfile) and row.technique == "full"), None)


def _folded(technique: str) -> str:
    """Break a long name between techniques."""
    return technique if len(technique) <= _NAME else technique.replace("+", "\n+")


def _size(size: int) -> str:
    return f"{_short(size)}B"


def _short(number: float) -> str:
    """Format with three digits and a prefix: ``546M``, ``1.02G``."""
    prefixes = ["", "k", "M", "G"]
    while abs(number) >= 999.5 and len(prefixes) > 1:
        number /= 1000
        prefixes.pop(0)
    return f"{number:.3g}{prefixes[0]}"
