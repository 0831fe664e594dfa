"""Small recipes with a stream of tasks, for the tests of continual learning."""

from collections.abc import Mapping
from typing import Any

import yaml

from fedtune.continual import StreamPlan
from fedtune.recipe.schema import Recipe
from fedtune.simulation import resolve_recipe
from tests.federations import TRIVIAL

__all__ = ["CLASSES", "make_plan", "make_stream_recipe", "resolve_stream"]

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
