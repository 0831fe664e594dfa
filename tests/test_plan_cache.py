"""Traces are shared by recipes with the same step, and by no others."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.plan.plan_report import trace_settings
from fedtune.recipe.yaml_file import parse_recipe
from tests.profile_examples import TEXT


def test_recipes_that_differ_in_their_algorithm_do_not_share_traces(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[str] = []

    def trace(request: str) -> dict[str, Any]:
        requests.append(request)
        return {"traces": [{"techniques": ["full"], "dtype": "float32", "master_values": len(requests)}]}

    monkeypatch.setattr("fedtune.plan.plan_report._run_worker", trace)
    found = [
        trace_settings(parse_recipe(TEXT.format(folder="model"), "tiny", settings), None)[0].master_values
        for settings in ([], ["federation.algorithm=scaffold"], ["federation.rounds=7"])
    ]
    assert found == [1, 2, 1]


def test_a_device_and_a_process_with_transformers_do_not_share_traces(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fedtune.plan.plan_report._run_worker",
        lambda request: {
            "traces": [
                {"techniques": ["full"], "dtype": "float32", "runtime": str(json.loads(request)["plain_blocks"])}
            ]
        },
    )
    recipe = parse_recipe(TEXT.format(folder="model"), "tiny")
    found = [trace_settings(recipe, None, plain_blocks=plain)[0].runtime for plain in (True, False, True)]
    assert found == ["True", "False", "True"]
