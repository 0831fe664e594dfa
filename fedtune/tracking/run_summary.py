"""Summaries of a run: its main metric, values before and after training, bytes sent, and peak memory."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedtune.recipe.metric_names import choose_main_metric
from fedtune.recipe.versions import read_stored_recipe
from fedtune.tracking.records import ClientRecord, MetricRecord, RoundRecord, RunRecord

__all__ = [
    "RoundMetric",
    "Totals",
    "compare_before_and_after",
    "compute_train_loss",
    "diff_recipes",
    "find_main_metric_name",
    "get_headline_metric",
    "get_metric_series",
    "get_privacy_spent",
    "get_progress_series",
    "list_domains",
    "list_metrics",
    "sum_costs",
]

RoundMetric = tuple[int, MetricRecord]


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over all rounds, in bytes and seconds; the two peaks are the largest of any client and round."""

    bytes_down: int
    bytes_up: int
    seconds: float
    activation_memory: int
    peak_memory: int
    merged: int
    requested: int


def sum_costs(rounds: Sequence[RoundRecord]) -> Totals:
    """Sum up bytes, seconds and client updates, and find the peaks."""
    every = [one for record in rounds for one in record.client_records]
    return Totals(
        bytes_down=sum(one.bytes_down for one in every),
        bytes_up=sum(one.bytes_up for one in every),
        seconds=sum(record.seconds for record in rounds),
        activation_memory=max((one.activation_memory for one in every), default=0),
        peak_memory=max((one.peak_memory for one in every), default=0),
        merged=sum(one.status == "merged" for one in every),
        requested=len(every),
    )


def list_metrics(rounds: Sequence[RoundRecord]) -> list[RoundMetric]:
    """Return every metric with the number of its round."""
    return [(record.number, metric) for record in rounds for metric in record.metrics]


def find_main_metric_name(run: RunRecord, scored: Iterable[RoundMetric]) -> str | None:
    """Return the metric that counts, of those measured on held-out examples; None without any."""
    measured = {metric.name for _, metric in scored if metric.split != "train"}
    return choose_main_metric(read_stored_recipe(run.recipe), measured)


def get_metric_series(rounds: Sequence[RoundRecord], split: str, domain: str, name: str) -> dict[int, float]:
    """Return the values of one metric by round number."""
    wanted = (split, domain, name)
    return {number: one.value for number, one in list_metrics(rounds) if (one.split, one.domain, one.name) == wanted}


def get_progress_series(rounds: Sequence[RoundRecord], name: str) -> tuple[str, dict[int, float]]:
    """Return the split that shows the progress of a run, and its values by round: validation, else local, else test."""
    found = {split: get_metric_series(rounds, split, "all", name) for split in ("validation", "local", "test")}
    split = next((split for split, values in found.items() if values), "validation")
    return split, found[split]


def list_domains(rounds: Sequence[RoundRecord], split: str, name: str) -> list[str]:
    """Return the domains of a metric, ``mean`` and ``all`` last."""
    found = {metric.domain for _, metric in list_metrics(rounds) if (metric.split, metric.name) == (split, name)}
    return sorted(found, key=lambda domain: (domain == "all", domain == "mean", domain))


def compare_before_and_after(rounds: Sequence[RoundRecord], split: str, name: str) -> dict[str, tuple[float, float]]:
    """Return a metric before training and its last value after training, by domain; NaN where it was not scored.

    The test split is scored at the end only, for the start as well: that value has the split ``test-before``.
    """
    found = {domain: get_metric_series(rounds, split, domain, name) for domain in list_domains(rounds, split, name)}
    start = {domain: _last(get_metric_series(rounds, f"{split}-before", domain, name)) for domain in found}
    return {domain: (values.pop(0, start[domain]), _last(values)) for domain, values in found.items()}


def get_privacy_spent(run: RunRecord, rounds: Sequence[RoundRecord]) -> dict[str, Any] | None:
    """Return the epsilon that these rounds spent, its delta, and who added the noise; None without privacy.

    Epsilon is None before the first round.
    """
    asked = read_stored_recipe(run.recipe).get("privacy")
    if asked is None:
        return None
    values = get_metric_series(rounds, "privacy", "all", "epsilon")
    return {
        "epsilon": values[max(values)] if values else None,
        "delta": asked["target_delta"],
        "noise_added_by": asked["noise_added_by"],
    }


def _last(values: Mapping[int, float]) -> float:
    return values[max(values)] if values else math.nan


def get_headline_metric(run: RunRecord, scored: Sequence[RoundMetric]) -> tuple[str, str, float] | None:
    """Return the headline of a run: split, metric and value, from the test split once it was scored after training."""
    name = find_main_metric_name(run, scored)
    of_split: dict[str, dict[int, float]] = {"validation": {}, "local": {}, "test": {}}
    for number, metric in scored:
        if (metric.domain, metric.name) == ("all", name) and metric.split in of_split:
            of_split[metric.split][number] = metric.value
    tested = max(of_split["test"], default=0) > 0
    split = "test" if tested else next((split for split, values in of_split.items() if values), "test")
    return (split, name, _last(of_split[split])) if name and of_split[split] else None


def compute_train_loss(records: Sequence[ClientRecord]) -> float:
    """Compute the mean loss of the merged client updates by examples; NaN if no client reports its loss."""
    merged = [one for one in records if one.status == "merged" and one.tells_loss]
    examples = sum(one.num_examples for one in merged)
    return sum(one.train_loss * one.num_examples for one in merged) / examples if examples else math.nan


def diff_recipes(recipes: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the dotted settings in which recipes differ, with the value in each recipe; None where it is not set."""
    flat = [_flat(recipe) for recipe in recipes]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = {key: [settings.get(key) for settings in flat] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def _flat(value: Any, at: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {at: value}
    pairs = [(f"{at}.{key}" if at else str(key), child) for key, child in value.items()]
    return {key: leaf for name, child in pairs for key, leaf in _flat(child, name).items()}
