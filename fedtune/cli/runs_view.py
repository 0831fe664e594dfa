"""Recorded runs in a terminal: plain tables of at most 80 columns that also work in a pipe."""

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from fedtune.cli.device_type_view import describe_device_types, list_compared_types
from fedtune.cli.drift_view import format_drift
from fedtune.cli.plain_table import make_table
from fedtune.cli.prediction_table import make_prediction_table
from fedtune.cli.stream_view import describe_setting_mix, iter_stream_tables, list_stream_rows
from fedtune.library.attack_text import describe_attackers, is_mere_attack
from fedtune.library.privacy_text import describe_privacy
from fedtune.recipe.versions import read_stored_recipe
from fedtune.tracking import ClientRecord, RoundRecord, RunRecord
from fedtune.tracking.client_spread import compute_spreads
from fedtune.tracking.prediction_summary import summarise_predictions
from fedtune.tracking.run_summary import (
    RoundMetric,
    compare_before_and_after,
    compute_train_loss,
    find_main_metric_name,
    get_headline_metric,
    get_progress_series,
    list_metrics,
    sum_costs,
)
from fedtune.tracking.sample_text import format_samples
from fedtune.tracking.stream_reference import Reference
from fedtune.untrusted import clean_text

__all__ = ["show_comparison", "show_list", "show_run"]

Rounds = Sequence[RoundRecord]
Recorded = Sequence[tuple[RunRecord, Rounds]]

_REASON = 500
"""How many characters of a reason are shown. Reasons may come from devices."""
_COLOURS = {"completed": "green", "running": "cyan", "failed": "red", "interrupted": "yellow"}


def show_list(runs: Sequence[RunRecord], newest: Mapping[str, Sequence[RoundMetric]]) -> None:
    """Print one line per run; ``newest`` contains the newest scores of each run."""
    if not runs:
        _console().print("No runs yet. Start one: fedtune simulate recipes/sentiment.yaml")
        return
    table = make_table("run", "status", "rounds>", "result", "started")
    for run in runs:
        done = f"{run.rounds_completed}/{run.rounds_planned}"
        table.add_row(
            run.id,
            _status(run.status),
            done,
            _headline(run, newest.get(run.id, ())),
            f"{_local(run.created_at):%d %b %H:%M}",
        )
    _console().print(table)


def show_run(run: RunRecord, rounds: Rounds, last: int | None = None, reference: Reference | None = None) -> None:
    """Print a run: its start and the ``last`` rounds, all by default. Totals cover every round.

    ``reference`` is the run that the stream was compared with.
    """
    console = _console()
    console.print(_facts(run, rounds), "")
    console.print(_rounds(run, rounds, last), "")
    if (name := find_main_metric_name(run, list_metrics(rounds))) is not None:
        console.print(_domains(rounds, name), "")
    for table in iter_stream_tables(run, rounds, reference):
        console.print(table, "")
    for line in _samples(rounds):
        console.print(line, soft_wrap=True)
    if any(record.client_scores for record in rounds):
        console.print(_clients(rounds), "")
    if any(record.client_records for record in rounds):
        console.print(_devices(rounds, _find_weights(run)), "")
    if planned := summarise_predictions(run, rounds):
        console.print(make_prediction_table(planned), "")
    for line in format_drift(rounds, _find_patience(run)):
        console.print(line, style="yellow" if "alarm in" in line or "drifts" in line else "")
    for line in _newest(list_problems(rounds), last):
        console.print(line, style="yellow")
    console.print(f"Next: fedtune runs plot {run.id}", soft_wrap=True)


def show_comparison(recorded: Recorded, settings: Mapping[str, Sequence[Any]]) -> None:
    """Print runs as columns: results, costs, then the settings in which they differ."""
    table = make_table("", *(run.id for run, _ in recorded))
    table.add_row("status", *(_status(run.status) for run, _ in recorded))
    table.add_row("rounds", *(f"{run.rounds_completed}/{run.rounds_planned}" for run, _ in recorded))
    table.add_row("result", *(_headline(run, list_metrics(rounds)) for run, rounds in recorded))
    costs = [sum_costs(rounds) for _, rounds in recorded]
    table.add_row("sent to clients", *(decimal(cost.bytes_down) for cost in costs))
    table.add_row("sent back", *(decimal(cost.bytes_up) for cost in costs))
    table.add_row("activations", *(decimal(cost.activation_memory) for cost in costs))
    table.add_row("time", *(_seconds(cost.seconds) for cost in costs))
    if types := list_compared_types([rounds for _, rounds in recorded]):
        table.add_row("computed on", *types)
    for name, cells in list_stream_rows(recorded):
        table.add_row(name, *cells)
    if settings:
        table.add_section()
    for key, values in settings.items():
        table.add_row(key, *(_setting(value) for value in values))
    _console().print(table)
    if (warning := describe_setting_mix(recorded)) is not None:
        _console().print(warning, style="yellow")


def _find_weights(run: RunRecord) -> str | None:
    """Return what clients of a packed run weigh by; None for a run that is not packed."""
    found: str | None = (read_stored_recipe(run.recipe).get("train") or {}).get("weigh_by")
    return found


def _find_patience(run: RunRecord) -> int:
    drift = (read_stored_recipe(run.recipe).get("stream") or {}).get("drift") or {}
    return int(drift.get("patience", 1))


def _facts(run: RunRecord, rounds: Rounds) -> Table:
    cost = sum_costs(rounds)
    grid = Table.grid(padding=(0, 2))
    grid.add_row("run", Text(run.id, "bold"))
    grid.add_row("recipe", run.name)
    grid.add_row(
        "status", Text.assemble(_status(run.status), f": {clean_text(run.reason, _REASON)}" if run.reason else "")
    )
    grid.add_row("started", f"{_local(run.created_at):%Y-%m-%d %H:%M}, engine {run.engine}, seed {run.seed}")
    grid.add_row("sent", f"{decimal(cost.bytes_down)} to clients, {decimal(cost.bytes_up)} back")
    grid.add_row("peak", f"{decimal(cost.activation_memory)} activation memory, {decimal(cost.peak_memory)} process")
    if computed := describe_device_types(rounds):
        grid.add_row("computed on", Text(computed, overflow="fold"))
    if private := describe_privacy(run, rounds):
        grid.add_row("privacy", private)
    if attackers := describe_attackers(run):
        grid.add_row("attackers", attackers)
    kept = [record for record in rounds if record.checkpoint and not record.checkpoint.pruned]
    if kept and kept[-1].checkpoint:
        pruned = sum(record.checkpoint is not None for record in rounds) - len(kept)
        others = f" (rounds kept: {', '.join(str(record.number) for record in kept)})" if pruned else ""
        grid.add_row("checkpoint", Text(kept[-1].checkpoint.path + others, overflow="fold"))
    return grid


def _rounds(run: RunRecord, rounds: Rounds, last: int | None) -> Table:
    name = find_main_metric_name(run, list_metrics(rounds)) or "accuracy"
    split, values = get_progress_series(rounds, name)
    table = make_table(
        "round>",
        "status",
        f"local {name}>" if split == "local" else f"{name}>",
        "training loss>",
        "merged>",
        "sent>",
        "time>",
    )
    hidden = 0 if last is None else max(0, len(rounds) - 1 - last)
    for place, record in enumerate([*rounds[:1], *rounds[1 + hidden :]]):
        if hidden and place == 1:
            table.add_row("…", f"{hidden} more: --all")
        cost = sum_costs([record])
        merged = f"{cost.merged}/{cost.requested}" if cost.requested else "-"
        loss, sent = _number(compute_train_loss(record.client_records)), decimal(cost.bytes_down + cost.bytes_up)
        value = _number(values.get(record.number, math.nan))
        table.add_row(str(record.number), _status(record.status), value, loss, merged, sent, _seconds(record.seconds))
    return table


def _domains(rounds: Rounds, name: str) -> Table:
    table = make_table("domain", "split", f"{name} before>", "after>")
    for split in ("validation", "local", "test"):
        for domain, (before, after) in compare_before_and_after(rounds, split, name).items():
            table.add_row(
                clean_text(domain), split, _number(before), _number(after), style="bold" if domain == "all" else ""
            )
    return table


def _samples(rounds: Rounds) -> list[str]:
    """Return the samples of the first and the last round that have any."""
    sampled = [record for record in rounds if record.samples]
    shown = sampled if len(sampled) < 3 else [sampled[0], sampled[-1]]
    return [
        line for record in shown for line in (f"samples of round {record.number}", *format_samples(record.samples), "")
    ]


def _clients(rounds: Rounds) -> Table:
    """Return how metrics vary between clients in the last round that clients scored."""
    found = compute_spreads(rounds)
    last = max(one.round for one in found)
    shown = [one for one in found if one.round == last]
    kinds = {one.device_type or "-" for one in shown}
    types = ["on"] if len(kinds) > 1 or "+" in min(kinds) else []
    table = make_table("clients' own", f"round {last}", "clients>", "mean>", "deviation>", "worst tenth>", *types)
    for one in shown:
        moment = "shared model" if one.moment == "shared" else f"{one.moment} training"
        figures = map(_number, (one.mean, one.deviation, one.worst_tenth))
        table.add_row(one.name, moment, str(one.clients), *figures, *([one.device_type or "-"] if types else []))
    return table


def _devices(rounds: Rounds, weighed_by: str | None) -> Table:
    """Return one line per device class, so that a thousand clients fit on a screen."""
    counted = "targets>" if weighed_by == "tokens" else "examples>"
    every = [one for record in rounds for one in record.client_records]
    late = [] if all(one.staleness is None for one in every) else ["rounds late>"]
    table = make_table("device", "clients>", "merged>", counted, "sent back>", "activations>", "peak process>", *late)
    for device in dict.fromkeys(one.device for one in every):
        own = [one for one in every if one.device == device]
        table.add_row(
            clean_text(device),
            str(len({one.client for one in own})),
            f"{sum(one.status == 'merged' for one in own)}/{len(own)}",
            str(sum(one.num_examples for one in own)),
            decimal(sum(one.bytes_up for one in own)),
            decimal(max(one.activation_memory for one in own)),
            decimal(max(one.peak_memory for one in own)),
            *([_staleness(own)] if late else []),
        )
    return table


def _staleness(records: Sequence[ClientRecord]) -> str:
    """Return mean and largest staleness of merged client updates."""
    found = [one.staleness for one in records if one.status == "merged" and one.staleness is not None]
    return f"{sum(found) / len(found):.1f}, at most {max(found)}" if found else "-"


def list_problems(rounds: Rounds) -> list[str]:
    """Failed rounds, client updates that were not merged, and updates with reduced settings."""
    lines = [
        f"round {one.number} failed: {clean_text(one.reason, _REASON)}" for one in rounds if one.status == "failed"
    ]
    return lines + [
        f"round {record.number}, client {one.client} ({clean_text(one.device)}): {one.status}, "
        f"{clean_text(one.reason, _REASON) or 'no reason given'}"
        for record in rounds
        for one in record.client_records
        if one.status != "merged" or (one.reason and not is_mere_attack(one))
    ]


def _newest(lines: Sequence[str], last: int | None) -> Sequence[str]:
    if last is None or len(lines) <= last:
        return lines
    return [f"{len(lines) - last} earlier lines like these: --all", *lines[-last:]]


def _console() -> Console:
    # No markup, because a reason may contain brackets.
    return Console(markup=False, highlight=False)


def _status(status: str) -> Text:
    return Text(status, _COLOURS.get(status, ""))


def _headline(run: RunRecord, scored: Sequence[RoundMetric]) -> str:
    found = get_headline_metric(run, scored)
    return f"{found[1]} {_number(found[2])}" if found else "-"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}" if abs(value) < 100 else f"{value:.4g}"


def _seconds(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)} min {rest:.0f} s" if minutes else f"{rest:.1f} s"


def _local(moment: datetime) -> datetime:
    return moment.astimezone()


def _setting(value: Any) -> str:
    """Format a setting for a reader: ``[{"lora": {"rank": 8}}]`` is ``lora rank 8``."""
    if isinstance(value, list):
        return " + ".join(_setting(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_setting(item)}".strip() for key, item in value.items())
    return "-" if value is None else str(value)
