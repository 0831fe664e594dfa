"""The plan of a real device: that of its class where the budget is the same, else the best that fits, or none."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from fedtune.cli.main import cli
from fedtune.device.local_data import LocalData
from fedtune.device.local_round import read_payload, run_local_round
from fedtune.device.plan_shortage import find_plan_shortage
from fedtune.device.trainer_channel import Frame
from fedtune.device.trainer_supervisor import TrainerSupervisor
from fedtune.errors import MemoryBudgetError, RecipeError
from fedtune.plan import plan_report, runtimes
from fedtune.plan.auto_techniques import plan_auto_techniques
from fedtune.plan.cache import write_entry
from fedtune.plan.device_plans import (
    apply_device_plan,
    choose_device_plan,
    describe_device_plan,
    describe_plans,
    limit_micro_batch,
)
from fedtune.plan.prediction import Runtime
from fedtune.recipe.memory_plans import MemoryPlans, PlanOption
from fedtune.recipe.schema import Recipe
from fedtune.recipe.yaml_file import parse_recipe
from fedtune.server.assignment import assign_devices
from fedtune.server.recipe_check_child import reply_to
from fedtune.simulation import resolve_recipe
from fedtune.training import get_model_state, get_run_context
from fedtune.wire.client_update import TrainRequest, decode_tensors, pack
from tests.federations import words
from tests.plan_examples import MB, give_traces
from tests.profile_examples import TEXT

PHONE, LAPTOP = 0, 1


@pytest.fixture(autouse=True)
def _given_traces(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    give_traces(monkeypatch)


def plan_two(phone: int, laptop: int, factor: float = 1.0) -> Recipe:
    """A recipe of a phone and a laptop, planned for so many megabytes each. ``factor`` corrects what phones hold."""
    devices = f"devices=[{{name: phone, count: 1, memory: {phone}MB}}, {{name: laptop, count: 1, memory: {laptop}MB}}]"
    settings = ["train.techniques=auto", "train.batch_size=4", devices]
    planned, _ = plan_auto_techniques(
        parse_recipe(TEXT.format(folder="model"), "tiny", settings), (), {"phone": factor}
    )
    return planned


@pytest.mark.parametrize("factor", [1.0, 1.15])
def test_a_device_with_the_budget_of_its_class_has_the_recipe_of_a_simulated_one(factor: float) -> None:
    for phone in range(210, 700, 15):
        for laptop in (phone, 900):
            recipe = plan_two(phone, laptop, factor)
            for client, budget in ((PHONE, phone), (LAPTOP, laptop)):
                assert apply_device_plan(recipe, client, budget * MB) == recipe.get_client_recipe(client)
                assert limit_micro_batch(recipe, client, budget * MB, None) is None
                assert limit_micro_batch(recipe, client, budget * MB, 1) == 1


def names(recipe: Recipe, client: int, megabytes: int) -> list[str]:
    return [unit.name for unit in apply_device_plan(recipe, client, megabytes * MB).train.techniques]


def test_devices_of_one_class_with_other_budgets_take_other_plans_of_its_batch() -> None:
    recipe = plan_two(260, 900)
    assert names(recipe, PHONE, 260) == names(recipe, LAPTOP, 260) == ["lora", "gradient-checkpointing"]
    assert names(recipe, PHONE, 900) == ["lora"]
    assert apply_device_plan(recipe, LAPTOP, 260 * MB).train.batch_size == 4
    assert limit_micro_batch(recipe, LAPTOP, 230 * MB, None) == 2
    assert limit_micro_batch(recipe, LAPTOP, 230 * MB, 1) == 1
    assert limit_micro_batch(recipe, LAPTOP, 900 * MB, 2) == 2  # the estimate knows the device


def test_a_plan_never_has_larger_micro_batches_than_the_class_has_batches() -> None:
    recipe = plan_two(190, 900)
    for budget in range(190, 900, 10):
        plan = choose_device_plan(recipe, PHONE, budget * MB)
        assert plan is not None
        assert plan.micro_batch <= recipe.get_client_recipe(PHONE).train.batch_size


def test_a_device_that_no_plan_fits_is_told_what_is_needed() -> None:
    recipe = plan_two(260, 900, 1.5)
    with pytest.raises(MemoryBudgetError, match=r"fits the 150 MB .* smallest needs \d+ MB; .* --memory") as laptop:
        choose_device_plan(recipe, LAPTOP, 150 * MB)
    assert (laptop.value.code, laptop.value.counts) == ("memory-plan", {"needed_mb": 187, "allowed_mb": 150})
    with pytest.raises(MemoryBudgetError, match="needs 256 MB"):
        choose_device_plan(recipe, PHONE, 255 * MB)
    plain = parse_recipe(TEXT.format(folder="model"), "tiny")
    assert choose_device_plan(plain, 0, 1) is None
    assert limit_micro_batch(plain, 0, 1, 3) == 3


def test_the_light_process_finds_the_same_shortage() -> None:
    recipe = plan_two(260, 900, 1.5)
    for client in (PHONE, LAPTOP):
        for budget in range(150 * MB, 300 * MB, 7 * MB):
            try:
                choose_device_plan(recipe, client, budget)
                expected = None
            except MemoryBudgetError as error:
                expected = error.counts
            found = find_plan_shortage(recipe.model_dump_json(), client, budget)
            assert (None if found is None else found.counts) == expected


@pytest.mark.parametrize(
    "recipe",
    [
        None,
        "{",
        "[]",
        "{}",
        '{"plans": null}',
        '{"plans": {"options": []}, "devices": []}',
        '{"plans": {"options": [{"anonymous_bytes": "many"}]}, "devices": [{"name": "a", "count": 2}]}',
        '{"plans": {"options": [{}]}, "devices": 3}',
        parse_recipe(TEXT.format(folder="model"), "tiny").model_dump_json(),
    ],
)
def test_a_recipe_that_the_light_process_cannot_judge_is_left_to_the_trainer(recipe: Any) -> None:
    assert find_plan_shortage(recipe, 0, 1) is None
    assert find_plan_shortage(recipe, None, 1) is None


def test_the_light_process_imports_neither_torch_nor_pydantic() -> None:
    import subprocess

    code = "import sys, fedtune.device.plan_shortage; print({'torch', 'pydantic'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_plans_are_described_by_class_and_device() -> None:
    recipe = plan_two(260, 900, 1.1)
    assert describe_plans(recipe)[1] == (
        "techniques of laptop: lora with micro-batches of 4, predicted peak 517 MB anonymous"
    )
    assert describe_plans(recipe)[0].endswith("MB anonymous, 10% more than predicted as in earlier runs")
    plain = parse_recipe(TEXT.format(folder="model"), "tiny")
    assert (describe_plans(plain), describe_device_plan(plain, 0, 1)) == ([], None)


def test_the_largest_devices_become_the_largest_classes_of_a_planned_recipe() -> None:
    recipe = plan_two(600, 900)
    assert not any(device.overridden_settings for device in recipe.devices)
    devices: list[Any] = [
        type("Device", (), {"name": name, "node_id": name, "profile": json.dumps({"memory": memory})})
        for name, memory in (("a", 900), ("b", 600), ("c", "all"))
    ]
    assert [one.device_name for one in assign_devices(recipe, devices[:2])] == ["b", "a"]
    assert [one.device_name for one in assign_devices(recipe, [devices[2], devices[0]])] == ["c", "a"]


def test_a_server_plans_what_it_is_sent(tmp_path: Path) -> None:
    words(tmp_path)  # writes the model and the data
    sent = json.loads(small_words(tmp_path).model_dump_json())
    sent["train"]["techniques"] = ["auto"]
    del sent["plans"]
    checked = Recipe.model_validate(reply_to(sent)["recipe"])
    assert [unit.name for unit in checked.train.techniques] == ["lora"]
    assert checked.plans is not None
    assert checked.train.techniques in [option.techniques for option in checked.plans.options]
    assert len(describe_plans(checked)) == 1
    sent["devices"][0]["memory"] = 100 * MB
    assert "no plan fits toy with 100 MB" in reply_to(sent)["refused"]


def small_words(folder: Path) -> Recipe:
    """The federation of tiny BERTs, with plans for whole batches with and without checkpointing, and for halves."""
    sizes = {"lora": (4, 900 * MB), "lora+gradient-checkpointing": (4, 700 * MB)}
    options = [
        an_option(techniques, micro, needed, 1 + number)
        for number, (techniques, (micro, needed)) in enumerate(sizes.items())
    ]
    options.append(an_option("lora+gradient-checkpointing", 2, 600 * MB, 4))
    recipe = words(folder, "train.techniques=lora", "train.optimiser=sgd")
    return resolve_recipe(recipe.model_copy(update={"plans": MemoryPlans(options=options)}))


def an_option(techniques: str, micro: int, needed: int, time: float) -> PlanOption:
    return PlanOption.model_validate(
        {
            "techniques": techniques.split("+"),
            "micro_batch": micro,
            "anonymous_bytes": needed - 64 * MB,
            "total_bytes": needed,
            "needed_bytes": needed,
            "relative_time": time,
        }
    )


@pytest.fixture
def supervisors() -> Iterator[list[TrainerSupervisor]]:
    made: list[TrainerSupervisor] = []
    yield made
    for one in made:
        one.stop_trainer()


def make_request(recipe: Recipe, number: int = 1) -> Frame:
    context = get_run_context(recipe.model_dump_json())
    payload = pack(get_model_state(context.model, context.shared_names))
    labels = json.dumps(context.corpus.label_names)
    header = {"recipe": recipe.model_dump_json(), "round": number, "client": 2, "run_id": "run", "label_names": labels}
    return Frame(header, payload)


def test_a_device_trains_with_its_own_plan_and_sends_the_tensors_of_its_class(
    tmp_path: Path, supervisors: list[TrainerSupervisor]
) -> None:
    recipe = small_words(tmp_path)
    config = tmp_path / "bert" / "config.json"  # smaller micro-batches would draw other dropout
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config.write_text(json.dumps(json.loads(config.read_text()) | dropout))
    request = make_request(recipe)
    supervisors.append(TrainerSupervisor("partition:2", 900 * MB, 60.0))
    whole = supervisors[0].run_request(Frame(dict(request.header), request.payload))
    supervisors[0].stop_trainer()
    supervisors.append(TrainerSupervisor("partition:2", 600 * MB, 60.0))  # the same device, which allows less now
    small = supervisors[1].run_request(Frame(dict(request.header), request.payload))
    assert (whole.header["kind"], small.header["kind"]) == ("trained", "trained"), (whole.header, small.header)
    assert whole.header["plan"].startswith("lora with micro-batches of 4")
    assert small.header["plan"].startswith("lora+gradient-checkpointing with micro-batches of 2")
    assert (whole.header["report"]["plan_number"], small.header["report"]["plan_number"]) == (0, 2)
    context = get_run_context(request.header["recipe"])
    deltas, _ = run_local_round(
        TrainRequest(**request.header),
        read_payload(request.payload, context, 2),
        context,
        context.client_rows[2],
        tmp_path,
    )
    assert whole.payload == deltas
    one, other = decode_tensors(whole.payload), decode_tensors(small.payload)
    assert {name: tensor.shape for name, tensor in one.items()} == {name: one.shape for name, one in other.items()}
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-6)


def test_a_device_that_no_plan_fits_declines_without_a_trainer(
    tmp_path: Path, supervisors: list[TrainerSupervisor]
) -> None:
    recipe = small_words(tmp_path)
    supervisors.append(TrainerSupervisor("partition:2", 500 * MB, 60.0))
    declined = supervisors[0].run_request(make_request(recipe))
    assert declined.header == {
        "kind": "declined",
        "problem": "memory-plan allowed_mb=500 needed_mb=600",
        "detail": "no plan of the run fits the 500 MB that this device allows, and the smallest needs 600 MB; allow "
        "that with fedtune device join --memory",
    }
    assert supervisors[0].pid is None
    other = recipe.model_copy(update={"plans": None})
    assert find_plan_shortage(other.model_dump_json(), 2, 500 * MB) is None
    with pytest.raises(MemoryBudgetError, match="the smallest needs 600 MB"):
        LocalData("partition:2", 500 * MB).get_context(TrainRequest(**make_request(recipe).header))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("0", "less than 1 MB"),
        ("512", "less than 1 MB"),
        ("0GB", "less than 1 MB"),
        ("lots", "not an amount of memory"),
    ],
)
def test_a_budget_that_is_none_is_refused_by_a_device(given: str, told: str) -> None:
    for words_ in (["join"], ["package"]):
        done = CliRunner().invoke(cli, ["device", *words_, "--data", "partition:0", "--memory", given])
        assert done.exit_code == 2
        assert told in done.stderr
        assert "512MB or 2GiB" in done.stderr


@pytest.mark.parametrize(("given", "told"), [("0", "greater than 0"), ("lots", "byte string"), ("-5MB", "byte string")])
def test_a_budget_that_is_none_is_refused_in_a_recipe_and_by_plan(given: str, told: str) -> None:
    with pytest.raises(RecipeError, match=f"devices.*memory.*{told}"):
        parse_recipe(TEXT.format(folder="model"), "tiny", [f"devices=[{{count: 1, memory: {given}}}]"])
    start = ["plan", "--model", "path:model", "--task", "text-classification", "--memory", given]
    done = CliRunner().invoke(cli, start)
    assert done.exit_code == 2
    assert f"--memory {given}: " in done.stderr
    assert "500MB" in done.stderr


def test_traces_and_constants_of_another_form_are_made_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("FEDTUNE_HOME", str(home))
    recipe = parse_recipe(TEXT.format(folder="model"), "tiny")
    monkeypatch.setattr(
        plan_report, "_run_worker", lambda _: {"traces": [{"techniques": ["lora"], "dtype": "float32"}]}
    )
    [traced] = plan_report.trace_settings(recipe, None)
    for old in ([{"name": "lora"}], {"plans": 1}, 3):
        for file in (home / "plans").iterdir():
            entry = json.loads(file.read_text())
            file.write_text(json.dumps(entry | {"value": old}))
        assert plan_report.trace_settings(recipe, None) == [traced]
    key = runtimes.make_runtime_key("torch", ())
    for odd in ([1], {"anonymous": 1}, "many", [1, None]):
        write_entry(key, odd)
        assert runtimes.read_runtime("torch", ()) is None
    write_entry(key, [1, 2])
    assert runtimes.read_runtime("torch", ()) == Runtime(1, 2)
