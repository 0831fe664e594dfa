"""Print the rounds of a submitted run until it ends."""

import time
from typing import Any

import click

from fedtune.cli.operator_client import OperatorClient
from fedtune.errors import RunError
from fedtune.untrusted import clean_text

__all__ = ["follow_run"]

_POLL_SECONDS = 0.5
_LONGEST_LINE = 2000
_WORKING = ("queued", "running")


def follow_run(connection: OperatorClient, run: str, *, quiet: bool = False) -> dict[str, Any]:
    """Print one line per round, and one if the run waits. Return the run's last state; RunError if it failed."""
    show = (lambda _: None) if quiet else _show
    last, shown = -1, ""
    while True:
        found: dict[str, Any] = connection.request_json("GET", f"runs/{run}?after={last}")
        run = found["id"]  # another may be the latest by the next look
        for record in found["rounds"]:
            show(f"round {record['number']}/{found['rounds_planned']}  {_summarise_round(record, found)}")
            for line in _format_samples(record.get("samples", [])):
                show(line)
            last = record["number"]
        if found["status"] not in _WORKING:
            break
        if found["reason"] and found["reason"] != shown:
            show(f"{found['status']}: {found['reason']}")
        shown = found["reason"]
        time.sleep(_POLL_SECONDS)
    if found["status"] == "failed":
        raise RunError(f"run {run} failed: {found['reason']}")
    show(f"run {run} is {found['status']}" + (f": {found['reason']}" if found["reason"] else ""))
    return found


def _show(line: str) -> None:
    """Print a line, which may quote a device."""
    click.echo(clean_text(line, _LONGEST_LINE))


def _format_samples(samples: list[dict[str, Any]]) -> list[str]:
    if not samples:
        return []
    from fedtune.tracking import SampleRecord  # with SQLAlchemy, which a run without samples can do without
    from fedtune.tracking.sample_text import format_samples

    return format_samples([SampleRecord(**one) for one in samples])


def _summarise_round(record: dict[str, Any], run: dict[str, Any]) -> str:
    """Summarise a round in one line."""
    sent = record["client_records"]
    merged = sum(one["status"] == "merged" for one in sent)
    words = [f"{merged}/{len(sent)} devices"] if sent else ["before training"]
    absent = [
        f"{one['device_name'] or one['device_class']} {one['status']}" for one in sent if one["status"] != "merged"
    ]
    words += [f"({', '.join(absent)})"] if absent else []
    words += [
        f"{metric['split']} {metric['name']} {metric['value']:.4f}"
        for metric in run["metrics"]
        if _is_shown(metric, record, run)
    ]
    words.append(f"{record['seconds']:.1f} s")
    return "  ".join(words) + (f"  FAILED: {record['reason']}" if record["status"] == "failed" else "")


def _is_shown(metric: dict[str, Any], record: dict[str, Any], run: dict[str, Any]) -> bool:
    main_metric = (run["recipe"].get("evaluation") or {}).get("main_metric")
    newest = metric["round"] == record["number"] and metric["domain"] == "all"
    return (
        newest
        and metric["split"] in ("validation", "local")
        and metric["name"] in ("accuracy", "perplexity", main_metric)
        and metric["value"] is not None
    )
