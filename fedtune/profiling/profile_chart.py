"""The plot of a profile: two bars for each technique, the memory kept for backward and the peak."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from fedtune.errors import StoreError
from fedtune.files import replace_file_atomically
from fedtune.profiling.profile_results import FailedProfile, ProfileResult, StepProfile

__all__ = ["draw_profile", "parse_image_format"]

# Okabe and Ito's palette, which readers with any colour vision can distinguish.
_KEPT, _PEAK = "#0072B2", "#E69F00"
_BAR = 0.38
_WIDE = 300
"""The largest ratio of peaks on a linear scale."""


def parse_image_format(path: Path) -> str:
    """Return ``png`` or ``svg``; StoreError for any other suffix."""
    kind = path.suffix.removeprefix(".").lower()
    if kind not in ("png", "svg"):
        raise StoreError(f"cannot draw into {path}; the name must end in .png or .svg")
    return kind


def draw_profile(rows: Sequence[ProfileResult], title: str, path: Path) -> None:
    """Draw the rows from top to bottom into a PNG or SVG file. A failed case keeps its place."""
    kind = parse_image_format(path)
    figure = Figure(figsize=(9, 1.4 + 0.62 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    _draw(axes, rows)
    _tidy(axes, [row.technique for row in rows])
    axes.set_title(title, loc="left", fontsize=11)
    figure.legend(loc="outside lower left", frameon=False, fontsize=9, ncols=2)
    with replace_file_atomically(path) as beside:
        figure.savefig(beside, format=kind, dpi=150)


def _draw(axes: Axes, rows: Sequence[ProfileResult]) -> None:
    places = {place: row for place, row in enumerate(rows) if isinstance(row, StepProfile)}
    kept = {place - _BAR / 2: row.kept_bytes for place, row in places.items()}
    peak = {place + _BAR / 2: row.peak_bytes for place, row in places.items()}
    _scale(axes, list(peak.values()))
    for bars, colour, name in ((kept, _KEPT, "kept for the backward pass"), (peak, _PEAK, "peak of the step")):
        drawn = axes.barh(list(bars), list(bars.values()), _BAR, color=colour, label=name)
        axes.bar_label(drawn, [EngFormatter("B", 1)(size) for size in bars.values()], padding=4, fontsize=9)
    for place, row in enumerate(rows):
        if isinstance(row, FailedProfile):
            axes.text(0.01, place, "did not run", transform=axes.get_yaxis_transform(), va="center", color="0.5")


def _scale(axes: Axes, peaks: Sequence[int]) -> None:
    """Start at zero, or use a logarithmic scale if the peaks differ too much. Leave room for the figures."""
    if not peaks:
        axes.set_xticks([])
    elif max(peaks) > _WIDE * max(1, min(peaks)):
        axes.set_xscale("log")
        axes.set_xlim(max(1, min(peaks)) / _WIDE, max(peaks) * _WIDE**0.3)
        axes.set_xlabel("logarithmic scale", fontsize=9)
    else:
        axes.set_xlim(0, max(*peaks, 1) * 1.14)


def _tidy(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(EngFormatter("B"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=3, color="0.6", labelsize=9)
