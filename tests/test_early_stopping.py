"""Runs that end early, and settings that change from a round on: refused, resumed, the same on real devices."""

from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import RecipeError
from fedtune.recipe.schema import Recipe
from fedtune.server.early_stopping import EarlyEnd
from fedtune.tracking import ClientRecord, MetricRecord, RoundRecord
from tests.federations import Ended, execute, trivial
from tests.test_buffered import deployed
from tests.test_robust_runs import resumed, rows

STOP = "federation.early_stopping={patience: 2}"


def a_watch(recipe: Recipe) -> EarlyEnd:
    context: Any = type("Context", (), {"recipe": recipe, "main_metric": "loss", "local_tensors": {}})()
    return EarlyEnd(context, [])


def scored(value: float) -> tuple[MetricRecord, ...]:
    return (MetricRecord(split="validation", domain="all", name="loss", value=value),)


@pytest.mark.parametrize(
    ("settings", "losses", "ends"),
    [
        ("{patience: 2}", [3, 2, 2, 1, 1, 1], (5, "patience", 3)),
        ("{patience: 2}", [3, 2, 1, 0.9, 0.8], None),
        ("{patience: 2, min_improvement: 0.5}", [3, 2, 1.6, 1.4, 1.3, 1.2], (5, "patience", 3)),
        ("{patience: 1}", [3, float("nan"), 1], (1, "patience", 0)),
        ("{target: 1.5}", [3, 2, 1.5, 1], (2, "target", 1.5)),
        ("{target: 1.5, patience: 1}", [3, 3], (1, "patience", 0)),
    ],
)
def test_when_a_run_ends_by_hand(settings: str, losses: list[float], ends: tuple[int, str, float] | None) -> None:
    """The loss is better when lower; round 0 counts as the first."""
    watch, found = a_watch(trivial("federation.rounds=9", f"federation.early_stopping={settings}")), None
    for number, loss in enumerate(losses):
        end = watch.judge_round(number, scored(loss)) if number else None
        if end is not None:
            found = (number, end.name, end.value)
            break
        watch.record_commit(number, scored(loss))
    assert found == ends


def test_a_run_without_improvement_ends_with_test_scores_and_a_reason(home: Path) -> None:
    """Weights begin at zero: the first step decides every prediction, and later ones change almost nothing."""
    recipe = trivial("federation.rounds=9", STOP, "train.lr=1e-9", "evaluation.max_examples=50")
    ended = execute(recipe)
    assert [record.number for record in ended.rounds] == [0, 1, 2, 3]
    assert (ended.run.status, ended.run.rounds_completed, ended.run.rounds_planned) == ("completed", 3, 9)
    assert ended.run.reason == "ended early after round 3: accuracy has not improved since round 1"
    last = {(one.split, one.name): one.value for one in ended.rounds[3].metrics}
    assert last["end", "patience"] == 1
    assert last["test", "accuracy"] > last["test-before", "accuracy"]
    whole = {(one.split, one.name): one.value for one in execute(trivial("train.lr=1e-9"), run="b").rounds[2].metrics}
    assert last["validation", "loss"] == pytest.approx(whole["validation", "loss"])


def test_a_target_that_is_met_ends_a_run_which_a_stop_does_not_change(home: Path) -> None:
    recipe = trivial("federation.rounds=5", "federation.early_stopping={target: 0.2}", "train.lr=0.1")
    alone, again = execute(recipe, run="alone"), resumed(recipe, (1, 3))
    assert 1 <= alone.run.rounds_completed < 5
    assert "has met the target" in alone.run.reason
    assert (alone.hashes, rows(alone), alone.run.reason) == (again.hashes, rows(again), again.run.reason)


def clients(ended: Ended | list[RoundRecord]) -> list[list[int]]:
    rounds = ended.rounds if isinstance(ended, Ended) else ended
    return [[one.client for one in record.client_records] for record in rounds[1:]]


def examples(records: tuple[ClientRecord, ...]) -> set[int]:
    return {one.num_examples for one in records}


def test_settings_change_from_their_round_on_simulated_deployed_and_resumed(home: Path) -> None:
    changes = "[{from_round: 2, local_steps: 3, clients_per_round: 4}, {from_round: 3, lr: 0.003, local_steps: 1}]"
    recipe = trivial("federation.rounds=3", "federation.clients_per_round=2", f"federation.schedule={changes}")
    alone, again = execute(recipe, run="alone"), resumed(recipe, (3, 0))
    assert [len(one) for one in clients(alone)] == [2, 4, 4]
    assert [examples(record.client_records) for record in alone.rounds[1:]] == [{20}, {30}, {10}]
    assert alone.hashes == again.hashes
    real = deployed(recipe, lambda client, number: 1.0, run="real")
    assert [record.checkpoint.sha256 for record in real if record.checkpoint] == alone.hashes
    norms = [max(one.update_norm for one in record.client_records) for record in alone.rounds[1:]]
    assert norms[2] < norms[1] / 10
    first = execute(trivial("federation.rounds=3", "federation.clients_per_round=2"), run="first")
    assert first.hashes[:2] == alone.hashes[:2]
    assert first.hashes[2] != alone.hashes[2]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("federation.early_stopping={}",), "ends no run yet; set patience, e.g. 5, or a target"),
        (("federation.early_stopping={patience: 0}",), "patience is 0"),
        (
            (
                "federation.early_stopping={patience: 2}",
                "train.techniques=[full, {batch-norm-statistics: {local: true}}]",
                "evaluation={local_holdout: 0.2, metrics: [f1], main_metric: f1}",
            ),
            "clients report accuracy and loss, but the main metric is f1; set evaluation.main_metric: loss",
        ),
        (("federation.early_stopping={target: .inf}",), "target is inf"),
        (("federation.early_stopping={target: 1, min_improvement: 1}",), "set patience, or drop it"),
        (("federation.schedule=[{from_round: 2}]",), "the entry from round 2 changes nothing"),
        (("federation.schedule=[{from_round: 1, lr: 1}]",), "from_round is 1"),
        (("federation.schedule=[{from_round: 2, lr: .nan}]",), "lr is nan"),
        (("federation.schedule=[{from_round: 3, lr: 1}]",), "from round 3, but the run has 2 rounds; drop the entry"),
        (("federation.schedule=[{from_round: 2, lr: 1}, {from_round: 2, lr: 2}]",), "list the entries by from_round"),
        (("federation.schedule=[{from_round: 2, local_epochs: 1}]",), "but train has local_steps; change local_steps"),
        (("federation.schedule=[{from_round: 2, clients_per_round: 5}]",), "is 5, but devices has only 4"),
        (
            ("federation.schedule=[{from_round: 2, clients_per_round: 1}]", "federation.quorum=2"),
            "is 1, below the 2 updates that quorum",
        ),
        (
            (
                "federation.schedule=[{from_round: 2, clients_per_round: 3}]",
                "merge=[trimmed-mean]",
                "devices=[{count: 5}]",
            ),
            "trimmed-mean needs at least 5 models, but a round brings 3",
        ),
    ],
)
def test_bad_settings_are_refused_before_anything_begins(overrides: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        trivial(*overrides)


def test_recipes_without_these_settings_are_written_as_before() -> None:
    assert trivial().model_dump()["federation"].keys().isdisjoint({"schedule", "early_stopping"})
    assert "attack" not in trivial().model_dump()["devices"][0]
