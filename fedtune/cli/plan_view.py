"""The output of ``fedtune plan``: a table that fits 80 columns, and the recommendation."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from fedtune.plan.plan_report import PlanReport
from fedtune.plan.plans import Plan, describe_plan
from fedtune.recipe.schema import Recipe
from fedtune.tasks import get_task

__all__ = ["make_plan_title", "show_plans"]


def make_plan_title(recipe: Recipe) -> str:
    """Describe in one line what is planned."""
    size = get_task(recipe.task).describe_input_size(recipe.train)
    return f"{recipe.model.source}, {recipe.train.batch_size} x {size}"


def show_plans(report: PlanReport, title: str) -> None:
    """Print the table, the recommendation, and what more or less memory would change."""
    console = Console(markup=False, highlight=False)
    console.print(_make_table(report, title))
    for line in _list_notes(report):
        console.print(line, soft_wrap=True)


def _make_table(report: PlanReport, title: str) -> Table:
    look: dict[str, Any] = {"box": None, "padding": (0, 1, 0, 0), "pad_edge": False, "header_style": "bold"}
    table = Table(title=title, title_justify="left", **look)
    table.add_column("")
    table.add_column("techniques", overflow="fold")
    for name in ("micro", "dtype", "anon", "total", "time", "sent", "gradients"):
        table.add_column(name, justify="left" if name == "gradients" else "right", no_wrap=True)
    for plan in report.plans:
        table.add_row(_mark(plan, report), plan.name.replace("+", "\n+"), *_list_cells(plan))
    return table


def _mark(plan: Plan, report: PlanReport) -> str:
    """``>`` for the recommended plan, ``-`` for one that does not fit."""
    if plan == report.recommended:
        return ">"
    return " " if plan.needed_bytes <= report.budget else "-"


def _list_cells(plan: Plan) -> list[str]:
    dtype = {"float32": "f32", "bfloat16": "bf16"}.get(plan.dtype, plan.dtype)
    memory = [f"{size / 1e6:.0f} MB" for size in (plan.anonymous_bytes, plan.total_bytes)]
    exact = "exact" if plan.exact_gradients else "approximate"
    return [
        str(plan.micro_batch),
        dtype,
        *memory,
        f"{plan.relative_time:.2f}x",
        _format_size(plan.bytes_per_round),
        exact,
    ]


def _format_size(size: int) -> str:
    return f"{size / 1e6:.3g} MB" if size >= 1e5 else f"{size / 1e3:.3g} kB"


def _list_notes(report: PlanReport) -> Iterator[str]:
    yield "anon, total: predicted peak of the process, without and with pages of files; -: does not fit"
    yield "time: operations of a step, relative to the fewest; sent: both directions of a round"
    if report.trainer:
        yield f"trainer: {report.trainer}"
    if report.correction != 1:
        yield f"memory: {report.correction - 1:.0%} more than traced, as devices of this class held in earlier runs"
    if report.recommended is not None:
        yield f"recommended: {report.reason}"
        yield f"25 % more memory: {_compare(report.with_more, report.recommended)}"
        yield f"25 % less memory: {_compare(report.with_less, report.recommended)}"
    for name, why in report.failed.items():
        yield f"{name} cannot be planned: {why}"


def _compare(other: Plan | None, chosen: Plan) -> str:
    if other is None:
        return "nothing fits"
    if other == chosen:
        return "the same plan"
    change = other.relative_time / chosen.relative_time - 1
    told = f"{abs(change):.0%} {'less' if change < 0 else 'more'} time" if round(change, 2) else "the same time"
    return f"{describe_plan(other)}, {told}"
