"""The plot of a plan: predicted memory against relative time, with the budget as a line."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from fedtune.files import replace_file_atomically
from fedtune.plan.plan_report import PlanReport
from fedtune.profiling.profile_chart import parse_image_format

__all__ = ["draw_plans"]

# Okabe and Ito's palette, which readers with any colour vision can distinguish.
_FITS, _TOO_LARGE, _CHOSEN = "#0072B2", "#999999", "#D55E00"


def draw_plans(report: PlanReport, title: str, path: Path) -> None:
    """Draw the Pareto set into a PNG or SVG file."""
    kind = parse_image_format(path)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for plan in report.plans:
        fits = plan.needed_bytes <= report.budget
        colour = _CHOSEN if plan == report.recommended else _FITS if fits else _TOO_LARGE
        axes.scatter(plan.needed_bytes, plan.relative_time, color=colour, zorder=3)
        label = f"{plan.name}, {plan.micro_batch}"
        axes.annotate(label, (plan.needed_bytes, plan.relative_time), (5, 3), textcoords="offset points", fontsize=8)
    axes.axvline(report.budget, color=_CHOSEN, linewidth=1, linestyle="--", label="budget")
    axes.xaxis.set_major_formatter(EngFormatter("B"))
    axes.set_xlabel("memory that the plan needs")
    axes.set_ylabel("operations of a step, relative to the fewest")
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.8)
    axes.legend(frameon=False, fontsize=9)
    with replace_file_atomically(path) as beside:
        figure.savefig(beside, format=kind, dpi=150)
