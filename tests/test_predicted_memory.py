"""Predicted memory beside what was held: in the store, in reports, and in what later plans learn from it."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from flwr.app import MetricRecord

from fedtune.cli.main import cli
from fedtune.device.client_app import app
from fedtune.errors import RecipeError, StoreError
from fedtune.plan.corrections import learn_corrections
from fedtune.recipe.memory_plans import MemoryPlans, PlanOption
from fedtune.recipe.schema import Recipe, Unit
from fedtune.recipe.yaml_file import parse_recipe
from fedtune.server import planned_techniques
from fedtune.server.planned_techniques import plan_techniques
from fedtune.simulation import resolve_recipe
from fedtune.tracking import ClientRecord, RoundRecord, Store
from fedtune.tracking.prediction_summary import summarise_predictions
from tests.federations import TRIVIAL, execute, spoilt, trivial
from tests.store_examples import a_client_record, a_round, start

MB = 10**6


def an_option(micro: int = 10, anonymous: int = 300 * MB, **changes: Any) -> PlanOption:
    option = PlanOption(
        techniques=[Unit(name="full")],
        micro_batch=micro,
        anonymous_bytes=anonymous,
        total_bytes=anonymous + 200 * MB,
        needed_bytes=anonymous + 64 * MB,
        relative_time=1.0 + 1 / micro,
    )
    return option.model_copy(update=changes)


def planned(*overrides: str, **corrections: float) -> Recipe:
    """The trivial federation with plans for whole and halved batches."""
    plans = MemoryPlans(options=[an_option(10), an_option(5, 200 * MB)], corrections=corrections)
    recipe = parse_recipe(TRIVIAL, "trivial", overrides)
    return resolve_recipe(recipe.model_copy(update={"plans": plans}))


def a_planned_record(client: int, held: int | None, **changes: Any) -> ClientRecord:
    """A contribution of a real phone that was predicted to hold 100 MB."""
    known: dict[str, Any] = {"device_class": "phone", "device_name": f"dev-{client}", "anonymous_memory": held}
    known |= {"predicted_anonymous": 100 * MB, "predicted_total": 150 * MB}
    return a_client_record(client, **(known | changes))


def a_planned_round(number: int, *records: ClientRecord) -> RoundRecord:
    return a_round(number, client_records=records)


def test_recipes_without_plans_are_written_as_before() -> None:
    assert "plans" not in trivial().model_dump_json()
    again = Recipe.model_validate_json(planned(toy=1.25).model_dump_json())
    assert again == planned(toy=1.25)
    assert again.plans is not None
    assert (again.plans.get_correction("toy"), again.plans.get_correction("phone")) == (1.25, 1.0)


@pytest.mark.parametrize("factor", ["0.5", "2.5", "nan", "much"])
def test_a_correction_that_cannot_be_is_refused(factor: str) -> None:
    options = json.dumps([an_option().model_dump(mode="json")])
    with pytest.raises(RecipeError, match=r"plans\.corrections"):
        parse_recipe(TRIVIAL, "trivial", [f"plans={{options: {options}, corrections: {{toy: {factor}}}}}"])


def test_other_techniques_than_those_of_the_plans_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"^train\.techniques are techniques of no plan, .* remove plans"):
        planned("train.techniques=bias")
    with pytest.raises(RecipeError, match=r"^devices: toy are techniques of no plan"):
        planned("devices=[{name: toy, count: 4, techniques: [bias]}]")


def test_a_run_records_what_its_plans_predict_and_trains_as_without_them(home: Path) -> None:
    plain, run = execute(trivial()), execute(planned(), run="run-2")
    assert plain.hashes == run.hashes
    records = [one for record in run.rounds for one in record.client_records]
    assert {(one.predicted_anonymous, one.predicted_total) for one in records} == {(300 * MB, 500 * MB)}
    assert {one.predicted_anonymous for record in plain.rounds for one in record.client_records} == {None}


def test_a_batch_that_is_no_plan_has_no_prediction(home: Path) -> None:
    run = execute(planned("train.batch_size=9"))
    assert {one.predicted_anonymous for record in run.rounds for one in record.client_records} == {None}


def test_halved_batches_have_the_prediction_of_their_size(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtune.device import client_app
    from fedtune.device.local_round import run_local_round

    monkeypatch.setattr(client_app, "run_local_round", partial(run_local_round, micro=5))
    run = execute(planned())
    assert {one.predicted_anonymous for record in run.rounds for one in record.client_records} == {200 * MB}


def _tell_plan(number: int) -> Callable[[Any, Any], Any]:
    def spoil(_: Any, reply: Any) -> Any:
        reply.content["report"] = MetricRecord({**reply.content["report"], "plan_number": number})
        return reply

    return spoil


@pytest.mark.parametrize(("number", "count"), [(2, 2), (0, 0)])
def test_a_report_of_a_plan_that_there_is_not_is_rejected(home: Path, number: int, count: int) -> None:
    recipe = planned() if count else trivial()
    run = execute(recipe, spoilt(_tell_plan(number), [1]))
    rejected = [one for record in run.rounds for one in record.client_records if one.status == "rejected"]
    assert {(one.client, one.predicted_anonymous) for one in rejected} == {(1, None)}
    assert f"names plan {number}, and the recipe has {count}" in rejected[0].reason


def test_a_stopped_run_keeps_its_plans_whatever_was_learned_since(home: Path) -> None:
    whole = execute(planned(toy=1.5))
    with Store.open() as store:
        start(store, "later")
        store.commit_round("later", a_planned_round(1, *(a_planned_record(one, 190 * MB) for one in range(3))))
        again = Recipe.model_validate_json(store.run("run-1").recipe)
    assert again.plans is not None
    assert again.plans.corrections == {"toy": 1.5}
    assert execute(again, app, run="run-2").hashes == whole.hashes


def test_the_median_error_is_learned_by_class_from_real_devices(home: Path) -> None:
    with Store.open() as store:
        start(store, "one")
        held = [120 * MB, 130 * MB, 900 * MB, None]
        simulated = a_planned_record(7, 500 * MB, device_name=None)
        unplanned = a_planned_record(8, 500 * MB, predicted_anonymous=None, predicted_total=None)
        store.commit_round(
            "one", a_planned_round(1, *(a_planned_record(*one) for one in enumerate(held)), simulated, unplanned)
        )
        short = [a_planned_record(client, 60 * MB, device_class="tablet") for client in range(3)]
        rare = [a_planned_record(client, 190 * MB, device_class="watch") for client in (3, 4)]
        store.commit_round("one", a_planned_round(2, *short, *rare))
        errors = store.predictions.list_errors()
    assert {name: sorted(round(one, 9) for one in found) for name, found in errors.items()} == {
        "phone": [0.2, 0.3, 8.0],
        "tablet": [-0.4] * 3,
        "watch": [0.9] * 2,
    }
    assert learn_corrections(errors) == {"phone": 1.3}
    assert learn_corrections({"odd": [8.0] * 3}) == {"odd": 2.0}
    assert learn_corrections({}) == {}


def test_old_contributions_are_forgotten(home: Path) -> None:
    with Store.open() as store:
        start(store, "one", rounds_planned=201)
        for number in range(1, 202):
            held = 900 * MB if number == 1 else 110 * MB
            store.commit_round("one", a_planned_round(number, a_planned_record(0, held)))
        [errors] = store.predictions.list_errors().values()
    assert [round(one, 9) for one in errors] == [0.1] * 200


def test_what_was_learned_reaches_the_next_plan(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def plan(recipe: Recipe, modules: Any, corrections: Any) -> tuple[Recipe, dict[str, Any]]:
        asked.append(dict(corrections))
        return recipe, {}

    monkeypatch.setattr(planned_techniques, "plan_auto_techniques", plan)
    recipe = parse_recipe(TRIVIAL, "trivial", ["train.techniques=auto"])
    plan_techniques(recipe)
    with Store.open() as store:
        start(store, "one")
        store.commit_round("one", a_planned_round(1, *(a_planned_record(one, 125 * MB) for one in range(3))))
    plan_techniques(recipe)
    assert plan_techniques(trivial()) == trivial()
    assert asked == [{}, {"phone": 1.25}]


def summarise(*records: ClientRecord, **recipe: Any) -> list[Any]:
    run: Any = SimpleNamespace(recipe=json.dumps({"version": 2, **recipe}))
    return summarise_predictions(run, [a_planned_round(1, *records)])


def test_a_summary_has_the_largest_bytes_and_the_median_error() -> None:
    records = [a_planned_record(client, held) for client, held in enumerate((110 * MB, 130 * MB, 90 * MB))]
    [found] = summarise(*records, plans={"corrections": {"phone": 1.2}})
    assert (found.device_class, found.contributions, found.correction) == ("phone", 3, 1.2)
    assert (found.predicted_anonymous, found.predicted_total, found.anonymous_memory) == (100 * MB, 150 * MB, 130 * MB)
    assert found.median_error == pytest.approx(0.1)
    [silent] = summarise(a_planned_record(0, None), a_client_record(1))
    assert (silent.contributions, silent.anonymous_memory, silent.median_error, silent.correction) == (1, None, None, 1)
    assert summarise(a_client_record(1), replace(records[0], predicted_anonymous=None)) == []


@pytest.mark.parametrize("plans", [None, [], 3, {}, {"corrections": None}, {"corrections": {"phone": "more"}}])
def test_plans_of_another_form_do_not_hide_a_run(plans: Any) -> None:
    [found] = summarise(a_planned_record(0, 110 * MB), plans=plans)
    assert found.correction == 1.0


def test_a_run_with_plans_that_this_version_does_not_know_is_shown_and_not_resumed(home: Path) -> None:
    recipe = json.loads(planned().model_dump_json())
    recipe["plans"]["options"][0]["energy"] = 3
    with Store.open() as store:
        start(store, "later", recipe=json.dumps(recipe), name="trivial")
    assert CliRunner().invoke(cli, ["runs", "show", "later"]).exit_code == 0
    for words in (["simulate", "--resume", "later"], ["export", "later", "-o", str(home / "out")]):
        done = CliRunner().invoke(cli, words)
        assert isinstance(done.exception, RecipeError | StoreError), (done.output, done.exception)
    with pytest.raises(RecipeError, match=r"the recipe of run later: .*energy.*; use the version of fedtune"):
        CliRunner().invoke(cli, ["simulate", "--resume", "later"], catch_exceptions=False)


def test_runs_show_tells_predictions_where_there_are_any(home: Path) -> None:
    with Store.open() as store:
        recipe = json.dumps({"version": 2, "name": "film", "plans": {"corrections": {"phone": 1.2}}})
        start(store, "new", recipe=recipe)
        store.commit_round("new", a_round(0))
        store.commit_round("new", a_planned_round(1, a_planned_record(0, 110 * MB)))
        start(store, "old")
        store.commit_round("old", a_round(0))
        store.commit_round("old", a_round(1))
    new, old = (CliRunner().invoke(cli, ["runs", "show", run]) for run in ("new", "old"))
    assert "memory plan" not in old.output
    lines = new.output.splitlines()
    [at] = [number for number, line in enumerate(lines) if line.startswith("memory plan")]
    assert lines[at + 2].split() == ["phone", "1", "100.0", "MB", "110.0", "MB", "+10.0%", "+20.0%"]
    document = json.loads(CliRunner().invoke(cli, ["runs", "show", "new", "--json"]).output)
    [told] = document["predictions"]
    assert (told["device_class"], told["correction"]) == ("phone", 1.2)
    assert document["rounds"][1]["client_records"][0]["predicted_total"] == 150 * MB
    before = json.loads(CliRunner().invoke(cli, ["runs", "show", "old", "--json"]).output)
    assert before["predictions"] == []
    assert before["rounds"][1]["client_records"][0]["predicted_anonymous"] is None
