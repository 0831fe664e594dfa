"""The curves of a run: its main metric by domain, its loss on held-out examples, and its training loss."""

from collections.abc import Mapping, Sequence

from fedtune.tracking import RoundRecord
from fedtune.tracking.run_detail import RoundSums
from fedtune.tracking.run_summary import get_metric_series, list_domains
from fedtune.tracking.stream_ledger import list_visits
from fedtune.untrusted import clean_text
from fedtune.web.chart_scale import RoundAxis
from fedtune.web.line_chart import Curve, LineChart, draw_chart

__all__ = ["draw_run_charts", "list_borders"]

_MAIN = ("all", "mean")
_LONGEST = 24


def draw_run_charts(
    rounds: Sequence[RoundRecord], sums: Mapping[int, RoundSums], name: str, axis: RoundAxis
) -> list[LineChart]:
    """Draw the main metric, the loss of the same split if it is another metric, and the training loss."""
    borders = list_borders(rounds)
    charts = [chart for metric in dict.fromkeys((name, "loss")) if (chart := _draw(rounds, metric, axis, borders))]
    trained = {number: one.train_loss for number, one in sums.items() if one.train_loss is not None}
    if trained:
        curve = Curve("mean", trained, main=True)
        charts.append(draw_chart("Train loss, mean over clients", "loss", [curve], axis, borders))
    return charts


def list_borders(rounds: Sequence[RoundRecord]) -> list[int]:
    """Return the last rounds of the visits of a stream that have ended."""
    return [one.last_round for one in list_visits(rounds) if one.last_round is not None]


def _draw(rounds: Sequence[RoundRecord], name: str, axis: RoundAxis, borders: Sequence[int]) -> LineChart | None:
    for split in ("validation", "local", "test"):
        curves = [
            Curve(clean_text(domain, _LONGEST), get_metric_series(rounds, split, domain, name), domain in _MAIN)
            for domain in _choose_domains(list_domains(rounds, split, name))
        ]
        if curves:
            return draw_chart(f"{split.capitalize()} {name}", name, curves, axis, borders)
    return None


def _choose_domains(domains: Sequence[str]) -> list[str]:
    """Leave out ``all`` where it says the same as ``mean`` or a single domain, so that one line is the main one."""
    own = [one for one in domains if one not in _MAIN]
    main = "mean" if "mean" in domains and len(own) > 1 else "all"
    return [*(own if len(own) > 1 else []), *(one for one in (main,) if one in domains)] or list(domains)
