"""The output of ``fedtune merge``: the report, the scores and the progress."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from fedtune.cli.plain_table import make_table

if TYPE_CHECKING:
    from fedtune.offline_merge import ModelComparison
    from fedtune.offline_merge.model_card import ModelMetrics

__all__ = ["show_byte_progress", "show_comparison", "show_metrics"]

_EVERY = 30.0
"""Seconds between lines without a terminal."""


@contextmanager
def show_byte_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show progress in bytes and the time left on standard error: a bar in a terminal, lines elsewhere."""
    console = Console(stderr=True, markup=False)
    if not console.is_terminal or console.is_dumb_terminal:
        yield _lines(what, total)
        return
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task(what, total=total)
        yield lambda done: bars.update(bar, completed=done)


def _lines(what: str, total: int) -> Callable[[int], None]:
    started = printed = time.monotonic()

    def show_line(done: int) -> None:
        nonlocal printed
        now = time.monotonic()
        if now - printed >= _EVERY and done:
            printed, left = now, round((now - started) * (total - done) / done)
            print(f"{what}: {done / total:.0%}, {left // 60}:{left % 60:02} left", file=sys.stderr, flush=True)

    return show_line


def show_comparison(found: "ModelComparison") -> None:
    """Print one row per model, then figures over all models."""
    table = make_table("model", "norm>", "cosines>", "changed>", "first tensor changed", "tokens")
    for place, name in enumerate(found.models):
        norm = "-" if found.norms is None else f"{found.norms[place]:.4f}"
        cosines = " ".join(f"{value:.3f}" for value in found.cosines[place])
        changed = "-" if found.changed is None else f"{found.changed[place]}/{found.tensors}"
        first = "-" if found.first is None else found.first[place] or "none"
        table.add_row(name, norm, cosines, changed, first, _words(found, place))
    console = _console()
    console.print(table)
    kind = "whole models" if found.norms is None else "deltas to the base; norms are relative to that of the base"
    console.print(f"\ncosines are between {kind}")
    if found.norms is not None:
        console.print(f"opposite directions at {found.conflicts:.1%} of {found.entries} entries")
    if found.scale is not None:
        console.print(
            f"with a scale of {found.scale:.3f}, the weighted sum has the mean norm of the deltas (a rule of thumb)",
            soft_wrap=True,
        )


def show_metrics(scores: "ModelMetrics") -> None:
    """Print one row per model and domain."""
    names = sorted({one.name for figures in scores.values() for one in figures})
    table = make_table("model", "domain", *(f"{name}>" for name in names))
    for model, figures in scores.items():
        for domain in dict.fromkeys(one.domain for one in figures):
            values = {one.name: f"{one.value:.4f}" for one in figures if one.domain == domain}
            table.add_row(model, domain, *(values.get(name, "") for name in names))
    _console().print(table)


def _words(found: "ModelComparison", place: int) -> str:
    words = found.words[place]
    if words is None:
        return "-"
    differs = words.more or words.missing or words.moved
    return f"+{words.more} -{words.missing} moved {words.moved}" if differs else "same"


def _console() -> Console:
    return Console(markup=False, highlight=False)
