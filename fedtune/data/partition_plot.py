"""The plot of a partition: one stacked bar per client."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fedtune.data.partition_summary import ClientExamples, PartitionSummary
from fedtune.files import replace_file_atomically

__all__ = ["draw_partition"]

MAX_BARS = 40


def draw_partition(summary: PartitionSummary, path: Path) -> None:
    """Write the plot as PNG. More than ``MAX_BARS`` clients are sorted by size and drawn without gaps or numbers."""
    figure = Figure(figsize=(9, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    (_bars if len(summary.holdings) <= MAX_BARS else _skyline)(axes, summary)
    axes.margins(x=0.01)
    axes.set_title(f"{summary.name}: {summary.parts['train']} training examples over {len(summary.holdings)} clients")
    axes.set_ylabel("examples")
    axes.spines[["top", "right"]].set_visible(False)
    if 1 < len(summary.values) <= MAX_BARS:
        axes.legend(title=summary.by, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, ncols=2)
    with replace_file_atomically(path) as beside:
        figure.savefig(beside, format="png")


def _bars(axes: Axes, summary: PartitionSummary) -> None:
    places = np.arange(len(summary.holdings))
    bottom = np.zeros(len(places))
    for name, heights in zip(summary.values, _counts(summary.holdings), strict=True):
        axes.bar(places, heights, bottom=bottom, label=name)
        bottom += heights
    axes.set_xticks(places, [f"{holding.client}\n{holding.device}" for holding in summary.holdings])


def _skyline(axes: Axes, summary: PartitionSummary) -> None:
    holdings = sorted(summary.holdings, key=lambda holding: (holding.examples, holding.counts), reverse=True)
    axes.stackplot(range(len(holdings)), _counts(holdings), labels=summary.values, step="mid", linewidth=0)
    axes.set_xlabel("clients, by number of examples")


def _counts(holdings: Sequence[ClientExamples]) -> NDArray[np.int64]:
    """Return the counts [values, clients]."""
    return np.array([holding.counts for holding in holdings]).T
