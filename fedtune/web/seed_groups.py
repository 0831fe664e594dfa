"""Runs that differ in their seed alone, as one group: what is compared are settings, not single runs."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedtune.recipe.versions import read_stored_recipe
from fedtune.tracking import RunRecord
from fedtune.tracking.run_summary import diff_recipes
from fedtune.untrusted import clean_text
from fedtune.web.recipe_view import format_setting

__all__ = ["SeedGroup", "group_by_seed", "list_differences"]

_LONGEST_LABEL = 60


@dataclass(frozen=True, kw_only=True)
class SeedGroup:
    """Runs with the same settings but the seed. ``settings`` is their recipe without name and seed."""

    label: str
    runs: Sequence[RunRecord]
    settings: Mapping[str, Any]

    def list_repeated(self) -> list[RunRecord]:
        """Return the completed runs that have a newer one with the same seed."""
        done = sorted((run for run in self.runs if run.status == "completed"), key=lambda run: run.created_at)
        newest = {run.seed: run.id for run in done}
        return [run for run in done if newest[run.seed] != run.id]

    def collect_values(self, values: Mapping[str, float]) -> dict[int, float]:
        """Return the values of its completed runs by seed; of two runs with one seed, that of the newer."""
        oldest_first = sorted(self.runs, key=lambda run: run.created_at)
        done = [run for run in oldest_first if run.status == "completed"]
        return {run.seed: values[run.id] for run in done if not math.isnan(values.get(run.id, math.nan))}


def group_by_seed(runs: Sequence[RunRecord]) -> list[SeedGroup]:
    """Group runs in the order given. A label is the name of the runs, with the settings that tell groups apart."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_read_settings(run), sort_keys=True), []).append(run)
    settings = [json.loads(key) for key in groups]
    differing = diff_recipes(settings)
    names = [found[0].name for found in groups.values()]
    return [
        SeedGroup(label=_make_label(names, index, differing), runs=found, settings=settings[index])
        for index, found in enumerate(groups.values())
    ]


def list_differences(groups: Sequence[SeedGroup]) -> list[tuple[str, list[str]]]:
    """Return the settings in which groups differ, with the value of each group; empty where it is not set."""
    found = diff_recipes([group.settings for group in groups])
    return [(key, [format_setting(value) for value in values]) for key, values in found.items()]


def _read_settings(run: RunRecord) -> dict[str, Any]:
    return {key: value for key, value in read_stored_recipe(run.recipe).items() if key not in ("name", "seed")}


def _make_label(names: Sequence[str], index: int, differing: Mapping[str, Sequence[Any]]) -> str:
    name = clean_text(names[index], _LONGEST_LABEL)
    if names.count(names[index]) == 1:
        return name
    parts = [f"{key.rpartition('.')[2]} {format_setting(values[index])}" for key, values in differing.items()]
    return clean_text(f"{name}, {', '.join(parts)}" if parts else name, 2 * _LONGEST_LABEL)
