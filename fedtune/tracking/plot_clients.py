"""How a run serves its clients, round by round: their mean, its spread, and the worst tenth of them."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from fedtune.tracking.client_spread import spreads
from fedtune.tracking.records import RoundRecord

__all__ = ["draw_clients"]


def draw_clients(axes: Axes, runs: Sequence[tuple[str, Sequence[RoundRecord], str]], moment: str) -> None:
    """Accuracy on what clients hold out, ``before`` or ``after`` they trained; runs with their label and colour."""
    axes.set_title(f"Clients' own accuracy {moment} training: mean, deviation, worst tenth dashed")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    for label, rounds, colour in runs:
        found = [one for one in spreads(rounds) if (one.moment, one.name) == (moment, "accuracy")]
        numbers, means = [one.round for one in found], [one.mean for one in found]
        axes.plot(numbers, means, "o-", color=colour, linewidth=1.8, markersize=3, label=label)
        axes.plot(numbers, [one.worst_tenth for one in found], "--", color=colour, linewidth=1.4)
        low, high = [one.mean - one.deviation for one in found], [one.mean + one.deviation for one in found]
        axes.fill_between(numbers, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.legend(frameon=False, fontsize=9)
