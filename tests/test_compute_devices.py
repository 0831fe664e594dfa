"""The setting of the device: how it is written, what ``auto`` takes, and what happens where the device is missing."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedtune import paths
from fedtune.accelerator import choose_device, find_device, require_device
from fedtune.cli.main import main
from fedtune.errors import ModelError, RecipeError
from fedtune.memory.accelerator_memory import (
    AcceleratorMemory,
    read_accelerator_peak,
    read_allocated_bytes,
    reset_accelerator_peak,
)
from fedtune.recipe.schema import ComputeDevice, DeviceClass, Recipe
from fedtune.simulation.compute_devices import describe_device_change, require_devices, suggest_accelerator
from fedtune.tracking import RoundRecord
from tests.tiny import a_training_recipe


def test_a_recipe_without_the_key_is_written_as_before_there_was_one() -> None:
    recipe = a_training_recipe()
    assert recipe.train.device == "cpu"
    assert "device" not in json.loads(recipe.model_dump_json())["train"]
    assert "device" not in json.loads(recipe.model_dump_json())["devices"][0]
    assert recipe == a_training_recipe(device="cpu")


@pytest.mark.parametrize("setting", ["auto", "cuda", "mps"])
def test_another_device_is_written_and_read_again(setting: ComputeDevice) -> None:
    recipe = a_training_recipe(device=setting)
    recipe = recipe.model_copy(update={"devices": [DeviceClass(count=2, device=setting)]})
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_a_device_class_overrides_the_device() -> None:
    recipe = a_training_recipe().model_copy(
        update={"devices": [DeviceClass(count=1, device="auto"), DeviceClass(count=1)]}
    )
    assert [recipe.get_client_recipe(client).train.device for client in (0, 1)] == ["auto", "cpu"]


@pytest.mark.parametrize(
    ("here", "taken"), [((), "cpu"), (("mps",), "mps"), (("cuda",), "cuda"), (("mps", "cuda"), "cuda")]
)
def test_auto_takes_cuda_before_mps_before_the_cpu(
    here: tuple[str, ...], taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in here)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in here)
    assert choose_device("auto").type == require_device("auto").type == taken


def test_a_missing_device_is_refused_where_it_is_required_and_left_out_where_not() -> None:
    with pytest.raises(RecipeError, match=r"train\.device: torch finds no cuda device on this machine"):
        require_device("cuda")
    assert choose_device("cuda").type == "cpu"


def test_a_model_on_two_devices_is_refused() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert find_device(net).type == "cpu"
    shown = type("Spread", (torch.nn.Module,), {"parameters": lambda _: [_Placed("cpu"), _Placed("cuda:0")]})
    with pytest.raises(ModelError, match="Spread lies on cpu and cuda:0"):
        find_device(shown())


class _Placed:
    def __init__(self, place: str) -> None:
        self.device = torch.device(place)


@pytest.mark.parametrize(
    "command",
    [
        ["simulate", "{recipe}", "--set", "train.device=cuda"],
        ["profile", "{recipe}", "--device", "cuda"],
        ["merge", "a", "b", "-o", "{folder}/merged", "--device", "cuda"],
    ],
)
def test_commands_refuse_a_missing_device_before_they_write(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    recipe = Path(__file__).parents[1] / "recipes" / "digits.yaml"
    given = [one.format(recipe=recipe, folder=tmp_path) for one in command]
    monkeypatch.setattr(sys, "argv", ["fedtune", *given])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "torch finds no cuda device on this machine" in capsys.readouterr().err
    assert not paths.get_runs_folder().exists()
    assert not (tmp_path / "merged").exists()


@pytest.fixture
def _a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def _of_class(device: ComputeDevice) -> Recipe:
    return a_training_recipe().model_copy(update={"devices": [DeviceClass(name="box", count=2, device=device)]})


def test_the_device_of_a_class_is_checked_too() -> None:
    with pytest.raises(RecipeError, match="devices: box: device: torch finds no cuda device"):
        require_devices(_of_class("cuda"))
    require_devices(_of_class("auto"), workers=8)


@pytest.mark.usefixtures("_a_card")
def test_workers_do_not_share_a_card() -> None:
    require_devices(a_training_recipe(device="auto"), workers=1)
    require_devices(a_training_recipe(), workers=8)
    for recipe in (a_training_recipe(device="auto"), _of_class("cuda")):
        with pytest.raises(RecipeError, match="workers: 2 processes cannot share one accelerator"):
            require_devices(recipe, workers=2)


def _a_round(device_type: str | None) -> RoundRecord:
    return RoundRecord(
        number=3,
        status="completed",
        reason="",
        seconds=1.0,
        client_records=(),
        metrics=(),
        checkpoint=None,
        device_type=device_type,
    )


def test_a_run_that_stays_on_its_type_of_device_resumes_without_a_word() -> None:
    assert describe_device_change([_a_round("cpu")], a_training_recipe(device="auto")) is None
    assert describe_device_change([_a_round(None)], a_training_recipe()) is None
    assert describe_device_change([], a_training_recipe()) is None


def test_a_run_that_changes_its_type_of_device_says_so() -> None:
    told = describe_device_change([_a_round("cpu"), _a_round("cuda")], a_training_recipe(device="auto"))
    assert told is not None
    assert told.startswith("round 3 was computed on cuda, and the run continues on cpu")


@pytest.mark.usefixtures("_a_card")
def test_an_old_run_of_unknown_type_was_on_the_cpu() -> None:
    told = describe_device_change([_a_round(None)], a_training_recipe(device="auto"))
    assert told is not None
    assert "computed on cpu, and the run continues on cuda" in told


@pytest.mark.usefixtures("_a_card")
def test_a_card_that_a_recipe_leaves_idle_is_named() -> None:
    assert "--set train.device=auto" in str(suggest_accelerator(a_training_recipe()))
    assert suggest_accelerator(a_training_recipe(device="auto")) is None


def test_nothing_is_suggested_without_a_card() -> None:
    assert suggest_accelerator(a_training_recipe()) is None


def test_the_memory_figures_of_a_card_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda", 1)
    asked: list[torch.device] = []

    def count(figure: int) -> Callable[[torch.device], int]:
        def answer(device: torch.device) -> int:
            asked.append(device)
            return figure

        return answer

    names = ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "reset_peak_memory_stats")
    for figure, name in enumerate(names, 1):
        monkeypatch.setattr(torch.cuda, name, count(figure))
    reset_accelerator_peak(card)
    assert read_accelerator_peak(card) == AcceleratorMemory(allocated=1, reserved=2)
    assert read_allocated_bytes(card) == 3
    assert asked == [card] * 4
    reset_accelerator_peak(torch.device("cpu"))
    assert (read_accelerator_peak(torch.device("cpu")), read_allocated_bytes(torch.device("cpu"))) == (None, 0)
    assert len(asked) == 4
