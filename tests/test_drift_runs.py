"""Runs that watch drift: figures, thresholds, alarms, opened tasks, clients that ask, and refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fedtune import paths
from fedtune.checkpoint import get_memory_path, read_checkpoint
from fedtune.continual._drift_opening import can_end_visit, end_visit
from fedtune.continual._drift_phases import find_phase
from fedtune.errors import FedtuneError, RecipeError
from fedtune.recipe.schema import Recipe
from fedtune.server import round_commit
from fedtune.server.events import DriftNoticed, describe_drift
from fedtune.server.selection import prefer_clients
from fedtune.server.server_app import run_to_completion
from fedtune.simulation import resolve_recipe
from fedtune.simulation.in_process_grid import InProcessGrid
from fedtune.simulation.workers import SequentialWorkers
from fedtune.tracking import RoundRecord, Store, claim_run
from fedtune.training import clear_run_context, get_run_context
from tests.federations import Ended, execute, outcome, silent, tiny_bert
from tests.streams import CLASSES, make_plan, resolve_stream

pytestmark = pytest.mark.usefixtures("home")

VERDICTS = (("fine", "good"), ("great", "good"), ("awful", "bad"), ("dull", "bad"))
SENTENCES = {"kitchen": "the film {} was {}", "garden": "was was was {} {} was was was was"}
TASKS = [{"name": "kitchen", "rounds": 3}, {"name": "garden", "rounds": 5}]


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """Sentences of two places that are built differently."""
    tiny_bert(tmp_path / "bert")
    lines = [
        f"{sentence.format(number % 20, word)},{label},{place}"
        for place, sentence in SENTENCES.items()
        for number in range(60)
        for word, label in VERDICTS
    ]
    (tmp_path / "words.csv").write_text("text,label,place\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def make_recipe(folder: Path, drift: dict[str, Any] | None, technique: str = "lora", **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "name": "drift",
        "task": "text-classification",
        "model": {"source": f"path:{folder}/bert"},
        "data": {
            "source": f"csv:{folder}/words.csv",
            "columns": {"text": "text", "label": "label", "domain": "place"},
        },
        "devices": [{"name": "toy", "count": 2}],
        "train": {"techniques": technique, "lr": 0.01, "batch_size": 8, "max_length": 16, "local_steps": 1},
        "federation": {},
        "stream": {"setting": "domain", "tasks": TASKS, **({} if drift is None else {"drift": drift})},
    }
    return resolve_recipe(Recipe.model_validate({**settings, **changes}))


def read_drift(record: RoundRecord) -> dict[str, float]:
    return {one.name: one.value for one in record.metrics if (one.split, one.domain) == ("drift", "all")}


def read_reference(number: int) -> dict[str, torch.Tensor]:
    return read_checkpoint(get_memory_path(paths.get_runs_folder() / f"run-1/round-{number:04d}.safetensors"))


def list_borders(ended: Ended) -> list[int]:
    return [record.number for record in ended.rounds if any(one.split == "border" for one in record.metrics)]


@pytest.mark.parametrize("signal", ["centred", "plain", "nac", "scale"])
def test_a_signal_rises_with_the_next_task_and_changes_nothing_else(words: Path, signal: str) -> None:
    plain = execute(make_recipe(words, None), run="plain")
    clear_run_context()
    ended = execute(make_recipe(words, {"signal": signal}))
    assert ended.hashes == plain.hashes
    found = [read_drift(record) for record in ended.rounds]
    assert not found[0]
    assert signal not in found[1]
    assert found[4][signal] > found[4]["threshold"]
    assert found[4]["above"] == 2
    assert found[4]["streak"] == 1
    if signal != "scale":  # the head is trained meanwhile, and scale compares with that of the reference round
        assert found[3][signal] < found[4][signal]
        assert found[6][signal] < found[4][signal]
    scores = [one for one in ended.rounds[4].client_scores if one.name == f"drift-{signal}"]
    assert [(one.client, one.moment, one.num_predictions) for one in scores] == [(0, "before", 32), (1, "before", 32)]
    more = [
        [(one.bytes_up, one.bytes_down) for one in record.client_records]
        for record in (*ended.rounds[6:], *plain.rounds[6:])
    ]
    ups = {up for sent in more for up, _ in sent}
    assert len(ups) == 1  # one number and one count in the report, no byte in the update


def test_the_reference_is_that_of_all_examples_together(words: Path) -> None:
    recipe = make_recipe(words, {}, devices=[{"name": "toy", "count": 3}], checkpoints={"keep": "all"})
    execute(recipe)
    first, second = read_reference(1), read_reference(4)
    context = get_run_context(recipe.model_dump_json())
    rows = [row for own in context.client_rows for row in own if context.task_numbers[row] == 0]
    assert len(rows) * 0.75 <= float(first["drift/counts"].sum()) <= len(rows) * 0.75 + 3
    assert float(second["drift/counts"].sum()) > 1.9 * float(first["drift/counts"].sum())
    assert {one.dtype for one in first.values()} == {torch.float64}


def test_an_alarm_opens_a_task_and_a_resumed_run_has_the_same_bits(
    words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(words, {"patience": 1, "opens": True}, checkpoints={"keep": "all"})
    alone = execute(recipe, run="alone")
    assert read_drift(alone.rounds[4])["opens"] == 5
    assert list_borders(alone) == [0, 3, 5, 8]
    visits = [(one.name, one.first_round, one.opened_by) for record in alone.rounds for one in record.tasks]
    assert visits == [("kitchen", 1, "recipe"), ("garden", 4, "recipe"), ("garden", 6, "drift")]
    closed = execute(make_recipe(words, {"patience": 1}), run="closed")
    assert list_borders(closed) == [0, 3, 8]
    assert closed.hashes[:5] == alone.hashes[:5]
    assert closed.hashes[7] != alone.hashes[7]  # the learning rate started again
    commit = round_commit.commit_round

    def stop(store: Store, run_id: str, number: int, result: Any) -> Any:
        if number == 6:
            raise KeyboardInterrupt
        return commit(store, run_id, number, result)

    clear_run_context()
    monkeypatch.setattr("fedtune.server.round_loop.commit_round", stop)
    with pytest.raises(KeyboardInterrupt):
        execute(recipe, run="killed")
    monkeypatch.setattr("fedtune.server.round_loop.commit_round", commit)
    clear_run_context()
    from fedtune.device.client_app import app

    with Store.open() as store, claim_run("killed"), silent():
        run_to_completion(InProcessGrid(2, SequentialWorkers(app)), store, "killed")
    killed = outcome("killed")
    assert killed.hashes == alone.hashes
    assert [one.metrics for one in killed.rounds] == [one.metrics for one in alone.rounds]
    assert [one.client_scores for one in killed.rounds] == [one.client_scores for one in alone.rounds]
    assert [one.tasks for one in killed.rounds] == [one.tasks for one in alone.rounds]


def test_clients_above_the_threshold_come_first(words: Path) -> None:
    assert prefer_clients([1, 4], range(6), [5]) == [1, 5]
    assert prefer_clients([1, 4], range(6), [0, 4, 5]) == [0, 4]
    assert prefer_clients([1, 4], [1, 2, 4], [5]) == [1, 4]
    assert prefer_clients([1, 4], range(6), []) == [1, 4]
    changes: dict[str, Any] = {"devices": [{"name": "toy", "count": 6}], "federation": {"clients_per_round": 2}}
    cohorts = {}
    for asks in (False, True):
        ended = execute(make_recipe(words, {"asks": asks}, **changes), run=f"asks-{asks}".lower())
        cohorts[asks] = [[one.client for one in record.client_records] for record in ended.rounds]
    assert cohorts[True][:5] == cohorts[False][:5]
    assert cohorts[True][5] == cohorts[True][4]  # both clients of the first round of the new task lie above
    assert cohorts[False][5] != cohorts[False][4]


def test_phases_are_those_of_the_plan() -> None:
    plan = make_plan()  # a: rounds 1 and 2, b: 3 to 5, a: 6
    assert [find_phase(plan, number) for number in range(1, 7)] == [
        "reference",
        "threshold",
        "reference",
        "threshold",
        None,
        "reference",
    ]


def test_a_visit_ends_early_with_a_round_inside_it() -> None:
    recipe = resolve_stream({"setting": "class", "tasks": {"size": 5, "rounds": 4}})
    assert [can_end_visit(recipe, number) for number in range(10)] == [
        *(False, True, True, True, False, True, True, True, False, False)
    ]
    ended = end_visit(recipe, 6)
    assert ended.stream is not None
    assert isinstance(ended.stream.tasks, list)
    assert [(one.name, one.rounds) for one in ended.stream.tasks] == [
        ("0+1+2+3+4", 4),
        ("5+6+7+8+9", 2),
        ("5+6+7+8+9", 2),
    ]
    assert ended.federation.rounds == 8
    assert Recipe.model_validate_json(ended.model_dump_json()) == ended
    with pytest.raises(ValueError, match="no visit can end early"):
        end_visit(recipe, 4)


def test_the_screen_names_clients_and_the_alarm() -> None:
    quiet = DriftNoticed(3, {}, 1.0, 1.5)
    one = DriftNoticed(4, {3: 4.126}, 1.2, 1.5)
    many = DriftNoticed(5, dict.fromkeys(range(7), 4.0), 4.0, 1.5, 2)
    assert describe_drift(quiet) == ""
    assert describe_drift(one) == "round 4  client 3 drifts (4.13); the threshold is 1.50"
    assert describe_drift(many).endswith("2 more; alarm: the mean 4.00 has been above 1.50 for 2 rounds")


DRIFT = {**CLASSES, "drift": {}}
PRIVATE = {"privacy": {"clipping_norm": 1.0, "noise_multiplier": 1.0}}
BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, PRIVATE, "privacy neither clips nor noises"),
    ({"arrival": {"staggered": 1}, "drift": {"opens": True}}, {}, "a new task opens for all clients at once"),
]


@pytest.mark.parametrize(("stream", "changes", "said"), BAD)
def test_recipes_that_cannot_be_are_refused(stream: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(FedtuneError, match=said):
        resolve_stream({**DRIFT, **stream}, **changes)


def test_training_what_features_come_from_is_refused(words: Path) -> None:
    recipe = make_recipe(words, {}, technique="full")
    with pytest.raises(RecipeError, match=r"full trains bert\.\S+, so the features would move"):
        get_run_context(recipe.model_dump_json())
    get_run_context(make_recipe(words, {}, technique="head-only").model_dump_json())


def test_tasks_without_one_class_per_example_need_the_plain_signal(words: Path) -> None:
    task = {"text-classification": {"problem_type": "regression"}}
    with pytest.raises(RecipeError, match=r"centred needs one class per example.*set signal: plain"):
        make_recipe(words, {}, task=task)


def test_settings_are_written_with_the_recipe(words: Path) -> None:
    recipe = make_recipe(words, {"signal": "nac"})
    written = yaml.safe_load(recipe.model_dump_json())["stream"]["drift"]
    assert written == {"signal": "nac", "batch": 32, "patience": 2, "opens": False, "asks": False}
