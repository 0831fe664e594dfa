"""Plots of one run or of several: quality, training loss, bytes sent, and activation memory."""

from collections.abc import Sequence
from itertools import accumulate, cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from matplotlib.typing import HashableList

from fedtune import files
from fedtune.errors import StoreError
from fedtune.tracking.client_spread import MOMENTS
from fedtune.tracking.plot_clients import draw_clients
from fedtune.tracking.plot_stream import draw_borders, draw_matrix, draw_stability_gap
from fedtune.tracking.records import ClientRecord, RoundRecord, RunRecord
from fedtune.tracking.run_summary import (
    compute_train_loss,
    find_main_metric_name,
    get_metric_series,
    get_progress_series,
    list_domains,
    list_metrics,
    sum_costs,
)
from fedtune.tracking.stream_ledger import find_task_ends, make_matrix

__all__ = ["draw_runs"]

Rounds = Sequence[RoundRecord]
Recorded = Sequence[tuple[RunRecord, Rounds]]

# Okabe and Ito's palette, which readers with any colour vision can distinguish.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
_BARS = 32  # more clients than this are shown by device class


def draw_runs(runs: Recorded, path: Path) -> None:
    """Draw runs into a PNG or SVG file; StoreError when there is nothing to draw or the file cannot be written."""
    kind = path.suffix.removeprefix(".").lower()
    if kind not in ("png", "svg"):
        raise StoreError(f"cannot draw into {path}; the name must end in .png or .svg")
    if not any(rounds for _, rounds in runs):
        raise StoreError("there is no recorded round to draw yet; wait for the first one")
    figure = _make_figure(runs)
    with files.replace_file_atomically(path) as beside:
        figure.savefig(beside, format=kind, dpi=150)


def _make_figure(runs: Recorded) -> Figure:
    found = {one.moment for _, rounds in runs for record in rounds for one in record.client_scores}
    moments = [moment for moment in MOMENTS if moment in found]
    matrix = make_matrix(*runs[0]) if len(runs) == 1 else None
    grid: list[HashableList[str]] = [["quality", "learning"], ["traffic", "memory"], *_arrange_panels(moments)]
    figure = Figure(figsize=(11, 7.5 + 3.5 * len(grid[2:])), layout="constrained")
    axes_of = figure.subplot_mosaic(grid)
    quality, learning, traffic, memory = (axes_of[name] for name in ("quality", "learning", "traffic", "memory"))
    of_clients = [axes_of[moment] for moment in moments]
    _draw_quality(quality, runs)
    _draw_learning(learning, runs)
    _draw_traffic(traffic, runs)
    if matrix is None:
        _draw_memory(memory, runs)
    else:
        draw_matrix(memory, matrix)
    if len({tuple(find_task_ends(rounds).items()) for _, rounds in runs}) == 1:
        for axes in (quality, traffic):
            draw_borders(axes, runs[0][1])
    for axes, moment in zip(of_clients, moments, strict=True):
        draw_clients(axes, _list_labelled_runs(runs), moment)
    for axes in (quality, learning, traffic, *of_clients):
        axes.set_xlim(-0.2, max(record.number for _, rounds in runs for record in rounds) + 0.2)
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (quality, learning, traffic, memory, *of_clients):
        _format_axes(axes, lines=axes is not memory or matrix is None)
    figure.suptitle(_title(runs), x=0.01, ha="left", fontsize=14, fontweight="bold")
    return figure


def _arrange_panels(moments: Sequence[str]) -> list[HashableList[str]]:
    """Arrange two panels in a row. A single one in the last row is wide."""
    return [[moments[place], moments[min(place + 1, len(moments) - 1)]] for place in range(0, len(moments), 2)]


def _title(runs: Recorded) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs compared"
    [(run, _)] = runs
    return f"{run.name}, run {run.id}: {run.status}, {run.rounds_completed} of {run.rounds_planned} rounds"


def _labels(runs: Recorded) -> list[str]:
    names = [run.name for run, _ in runs]
    return names if len(set(names)) == len(names) else [run.id for run, _ in runs]


def _list_labelled_runs(runs: Recorded) -> list[tuple[str, Rounds, str]]:
    return [
        (label, rounds, colour)
        for label, (_, rounds), colour in zip(_labels(runs), runs, cycle(_COLOURS), strict=False)
    ]


def _draw_quality(axes: Axes, runs: Recorded) -> None:
    name = next((found for run, rounds in runs if (found := find_main_metric_name(run, list_metrics(rounds)))), None)
    if name is None:
        _show_note(axes, "Held-out metric", "none recorded")
        return
    split = next(
        (
            split
            for split in ("validation", "local")
            if any(get_progress_series(rounds, name)[0] == split for _, rounds in runs)
        ),
        "test",
    )
    axes.set_title(f"{name.capitalize()} on {split}")
    if name == "accuracy":
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    if len(runs) == 1:
        _draw_domains(axes, runs[0][1], split, name)
    else:
        for label, rounds, colour in _list_labelled_runs(runs):
            _draw_line(axes, get_metric_series(rounds, split, "all", name), color=colour, label=label)
    axes.legend(frameon=False, fontsize=9)


def _draw_domains(axes: Axes, rounds: Rounds, split: str, name: str) -> None:
    single = [domain for domain in list_domains(rounds, split, name) if domain != "all"]
    for domain, colour in zip(single, cycle(_COLOURS), strict=False):
        _draw_line(
            axes,
            get_metric_series(rounds, split, domain, name),
            color=colour,
            label=domain,
            linewidth=1,
            markersize=2.5,
        )
    _draw_line(axes, get_metric_series(rounds, split, "all", name), color="black", label="all", linewidth=2.4)
    if name == "accuracy":
        draw_stability_gap(axes, rounds, split)
    test = get_metric_series(rounds, "test", "all", name) if split != "test" else {}
    if test:
        axes.plot(
            list(test),
            list(test.values()),
            "D",
            color="black",
            markerfacecolor="white",
            markersize=7,
            label="all, test",
        )


def _draw_line(
    axes: Axes, values: dict[int, float], *, color: str, label: str, linewidth: float = 1.8, markersize: float = 4
) -> None:
    axes.plot(
        list(values), list(values.values()), "o-", color=color, label=label, linewidth=linewidth, markersize=markersize
    )


def _draw_learning(axes: Axes, runs: Recorded) -> None:
    axes.set_title("Training loss, mean over examples")
    for label, rounds, colour in _list_labelled_runs(runs):
        losses_of = {
            record.number: [one.train_loss for one in record.client_records if _has_loss(one)] for record in rounds
        }
        trained = [record for record in rounds if losses_of[record.number]]
        means = {record.number: compute_train_loss(record.client_records) for record in trained}
        _draw_line(axes, means, color=colour, label=label if len(runs) > 1 else "mean of clients")
        if len(runs) == 1:
            losses = [losses_of[record.number] for record in trained]
            low, high = [min(each) for each in losses], [max(each) for each in losses]
            axes.fill_between(list(means), low, high, color=colour, alpha=0.15, linewidth=0, label="least to most")
    axes.legend(frameon=False, fontsize=9)


def _has_loss(sent: ClientRecord) -> bool:
    """Return whether the loss of a client counts: its update was merged, and it reports the loss."""
    return sent.status == "merged" and sent.tells_loss


def _draw_traffic(axes: Axes, runs: Recorded) -> None:
    axes.set_title("Bytes sent so far" if len(runs) == 1 else "Bytes sent so far: solid from clients, dashed to them")
    axes.yaxis.set_major_formatter(EngFormatter(unit="B"))
    for label, rounds, colour in _list_labelled_runs(runs):
        numbers = [record.number for record in rounds]
        down = accumulate(sum(one.bytes_down for one in record.client_records) for record in rounds)
        up = accumulate(sum(one.bytes_up for one in record.client_records) for record in rounds)
        one = len(runs) == 1
        axes.plot(numbers, list(up), "-", color=colour, linewidth=1.8, label="from clients" if one else label)
        axes.plot(numbers, list(down), "--", color=colour, linewidth=1.6, label="to clients" if one else None)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)


def _draw_memory(axes: Axes, runs: Recorded) -> None:
    title = "Peak activation memory kept for backward"
    if not any(sum_costs(rounds).activation_memory for _, rounds in runs):
        _show_note(axes, title, "not measured")
        return
    axes.set_title(title)
    axes.yaxis.set_major_formatter(EngFormatter(unit="B"))
    if len(runs) > 1:
        labels, _, colours = zip(*_list_labelled_runs(runs), strict=True)
        axes.bar(labels, [sum_costs(rounds).activation_memory for _, rounds in runs], color=colours, width=0.6)
        axes.tick_params(axis="x", labelrotation=20 if len(runs) > 3 else 0)
    else:
        _draw_clients(axes, runs[0][1])


def _draw_clients(axes: Axes, rounds: Rounds) -> None:
    """Draw one bar per client, coloured by device, or one per device class when there are many clients."""
    every = [one for record in rounds for one in record.client_records]
    many = len({one.client for one in every}) > _BARS
    peaks: dict[tuple[str, str], int] = {}
    for one in sorted(every, key=lambda one: one.client):
        key = (one.device, one.device if many else str(one.client))
        peaks[key] = max(peaks.get(key, 0), one.activation_memory)
    for device, colour in zip(dict.fromkeys(device for device, _ in peaks), cycle(_COLOURS), strict=False):
        bars = {label: peak for (of, label), peak in peaks.items() if of == device}
        axes.bar(list(bars), list(bars.values()), color=colour, label=device, width=0.7)
    axes.set_xlabel("device class" if many else "client")
    if not many:
        axes.set_ylim(top=1.2 * axes.get_ylim()[1])  # room for the legend
        axes.legend(frameon=False, fontsize=9, ncols=4, loc="upper left")


def _show_note(axes: Axes, title: str, text: str) -> None:
    axes.set_title(title)
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="0.5")


def _format_axes(axes: Axes, *, lines: bool = True) -> None:
    axes.title.set(fontsize=11, ha="left", x=0)
    axes.spines[["top", "right"]].set_visible(False)
    if lines:
        axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=3, color="0.6", labelsize=9)
