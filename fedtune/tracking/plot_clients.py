"""Plots of client scores by round: their mean, deviation and worst tenth."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from fedtune.tracking.client_spread import compute_spreads
from fedtune.tracking.records import RoundRecord

__all__ = ["draw_clients"]


def draw_clients(axes: Axes, runs: Sequence[tuple[str, Sequence[RoundRecord], str]], moment: str) -> None:
    """Draw the accuracy on what clients hold out, at one ``moment`` of each round. Runs have a label and a colour."""
    one = len(runs) == 1
    when = "of the shared model" if moment == "shared" else f"{moment} training"
    axes.set_title(f"Clients' local accuracy {when}" + ("" if one else ", worst tenth dashed"))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    for label, rounds, colour in runs:
        found = [spread for spread in compute_spreads(rounds) if (spread.moment, spread.name) == (moment, "accuracy")]
        numbers, means = [spread.round for spread in found], [spread.mean for spread in found]
        worst = [spread.worst_tenth for spread in found]
        low, high = ([spread.mean + sign * spread.deviation for spread in found] for sign in (-1, 1))
        axes.plot(numbers, means, "o-", color=colour, linewidth=1.8, markersize=3, label="mean" if one else label)
        axes.plot(numbers, worst, "--", color=colour, linewidth=1.4, label="worst tenth" if one else None)
        axes.fill_between(numbers, low, high, color=colour, alpha=0.15, linewidth=0, label="deviation" if one else None)
    axes.legend(frameon=False, fontsize=9)
