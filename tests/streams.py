"""Small recipes with a stream of tasks, for the tests of continual learning."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtune.continual import StreamPlan
from fedtune.recipe.schema import Recipe
from fedtune.simulation import resolve_recipe
from tests.federations import TRIVIAL, Ended, outcome
from tests.kills import start

__all__ = ["CLASSES", "check_killed_run", "list_memory", "make_plan", "make_stream_recipe", "resolve_stream"]

CLASSES = {"setting": "class", "tasks": {"size": 2, "rounds": 1}}
"""Ten digits, two at a time."""
_LISTED = [{"name": "a", "rounds": 2}, {"name": "b", "rounds": 3}, {"name": "a", "rounds": 1}]


def make_stream_recipe(stream: Mapping[str, Any], **changes: Any) -> Recipe:
    """Logistic regression on digits, with a stream; ``changes`` replace whole sections."""
    settings = {**yaml.safe_load(TRIVIAL), "federation": {}, "stream": dict(stream), **changes}
    return Recipe.model_validate(settings)


def resolve_stream(stream: Mapping[str, Any], **changes: Any) -> Recipe:
    """The same recipe with every setting written out."""
    return resolve_recipe(make_stream_recipe(stream, **changes))


def make_plan(**stream: Any) -> StreamPlan:
    """The plan of four clients for tasks a (2 rounds), b (3), a (1)."""
    return StreamPlan(make_stream_recipe({"setting": "domain", "by": "place", "tasks": _LISTED, **stream}))


def check_killed_run(folder: Path, plant: str, stream: Mapping[str, Any], **changes: Any) -> Ended:
    """Kill a run of the digits at a point and resume it: it must end like one left alone, which is returned."""
    file = folder / "recipe.yaml"
    settings = {**yaml.safe_load(TRIVIAL), "federation": {}, "stream": dict(stream), **changes}
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    ends = []
    for home, chosen in ((folder / "alone", ""), (folder / "killed", plant)):
        process = start(home, "simulate", str(file), "--json", plant=chosen)
        process.join()
        if chosen:
            assert process.exitcode == -9
            process = start(home, "simulate", "--resume", "latest", "--json")
            process.join()
        assert process.exitcode == 0, (home / "printed").read_text()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FEDTUNE_HOME", str(home))
            ends.append(outcome())
    alone, killed = ends
    assert killed.hashes == alone.hashes
    assert [one.metrics for one in killed.rounds] == [one.metrics for one in alone.rounds]
    assert list_memory(killed) == list_memory(alone)
    return alone


def list_memory(ended: Ended) -> list[str | None]:
    """The digest of what the server remembers beside each checkpoint, None where it keeps nothing new."""
    return [one.checkpoint.memory_sha256 for one in ended.rounds if one.checkpoint]
