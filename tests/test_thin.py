"""A device's thin install: the list it is made by, and that a device works and trains the same without the rest."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fedtune import minimal_install
from fedtune.device.local_data import LocalData
from fedtune.device.local_round import read_payload, run_local_round
from fedtune.training import clear_run_context, get_model_state
from fedtune.wire.client_update import TrainRequest, pack
from fedtune.wire.masked_weights import encode_masked_state
from tests.federations import execute, trivial, words
from tests.servers import ended, joined, serving
from tests.test_deployment import hashes, submit

HIDDEN = f"""
import sys
from importlib.machinery import PathFinder
class Thin(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        left_out = name.split(".")[0].replace("_", "-") in {set(minimal_install.EXCLUDED_PACKAGES)!r}
        return None if left_out else super().find_spec(name, path, target)
sys.meta_path = [Thin if finder is PathFinder else finder for finder in sys.meta_path]
"""
TRAIN = """
from pathlib import Path
from fedtune.device.trainer import Trainer
from fedtune.device.trainer_channel import Frame
recipe, payload, sent = (Path(name) for name in sys.argv[1:])
order = {"recipe": recipe.read_text(), "round": 1, "client": 0, "label_names": "[]", "run_id": "run"}
answer = Trainer("partition:0", 10**11, 0).run_request(Frame(order, payload.read_bytes()), lambda: None)
assert answer.header["kind"] == "trained", answer.header
sent.write_bytes(answer.payload)
"""


class Fake(NamedTuple):
    """What a distribution says of itself."""

    version: str
    requires: list[str] | None = None


FAKES = {
    "fedtune": Fake("1", ["Torch>=2", "matplotlib", "web[fast]>1", "ray; extra == 'ray'"]),
    "Torch": Fake("2+cpu", ["numbers", "Cycle_Of"]),
    "numbers": Fake("3"),
    "Cycle_Of": Fake("4", ["torch", "windows-only; sys_platform == 'win32'"]),
    "web": Fake("5", ["SQLAlchemy", "numbers", "quick; extra == 'fast'", "slow; extra == 'slow'"]),
    "quick": Fake("6"),
    "matplotlib": Fake("7", ["fonts"]),
    "SQLAlchemy": Fake("8", ["greenlet"]),
}


def test_everything_is_listed_but_what_is_left_out_and_what_only_that_requires(monkeypatch: pytest.MonkeyPatch) -> None:
    by_name: dict[str, Any] = FAKES | {"torch": FAKES["Torch"]}
    monkeypatch.setattr(minimal_install, "distribution", by_name.__getitem__)
    assert minimal_install.list_requirements() == [
        "cycle-of==4",
        "fedtune==1",
        "numbers==3",
        "quick==6",
        "torch==2+cpu",
        "web==5",
    ]


def test_the_list_holds_this_machine_s_versions_and_none_of_the_rest() -> None:
    listed = dict(line.split("==") for line in minimal_install.list_requirements())
    for name in ("fedtune", "flwr", "torch", "transformers", "peft", "pyarrow", "pillow", "numpy"):
        assert listed[name] == version(name)
    assert not listed.keys() & {
        *minimal_install.EXCLUDED_PACKAGES,
        "greenlet",
        "mako",
        "fonttools",
        "uvloop",
        "ray",
        "pytest",
    }


def hidden(script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", HIDDEN + script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", ["image", pytest.param("text", marks=pytest.mark.deployed)])
def test_a_trainer_sends_the_same_bits_without_what_is_left_out(home: Path, tmp_path: Path, kind: str) -> None:
    recipe = trivial() if kind == "image" else words(tmp_path)
    order = TrainRequest(recipe.model_dump_json(), 1, 0, "run", "[]")
    shop, rows = LocalData("partition:0").get_context(order)
    payload = pack(encode_masked_state(get_model_state(shop.model, shop.shared_names)))
    deltas, _ = run_local_round(order, read_payload(payload, shop, order.client), shop, rows, tmp_path / "own")
    clear_run_context()
    paths = [tmp_path / name for name in ("recipe", "payload", "sent")]
    paths[0].write_text(order.recipe)
    paths[1].write_bytes(payload)
    done = hidden(TRAIN, *map(str, paths))
    assert done.returncode == 0, done.stderr
    assert paths[2].read_bytes() == deltas


@pytest.mark.deployed
def test_a_run_on_thin_devices_has_the_bits_of_a_simulation(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDTUNE_OPERATOR_FILE", raising=False)
    home.mkdir()
    (tmp_path / "sitecustomize.py").write_text(HIDDEN)
    recipe = words(tmp_path, "devices=[{name: toy, count: 2}]")
    simulated = execute(recipe, run="simulated").hashes
    with (
        serving(home) as server,
        joined(server, tmp_path, "partition:0", "partition:1", PYTHONPATH=f"{tmp_path}:{Path.cwd()}") as devices,
    ):
        found = ended(server, submit(server, recipe))
    assert found["status"] == "completed", [found["reason"], *(device.log for device in devices)]
    assert hashes(found) == simulated


def test_a_device_s_own_process_needs_nothing_of_it() -> None:
    done = hidden(
        "import fedtune.device.join, fedtune.device.enrolment, fedtune.device.deployment_files, fedtune.cli.device"
    )
    assert done.returncode == 0, done.stderr


def test_a_command_that_needs_more_says_so_in_one_sentence(home: Path) -> None:
    done = hidden("from fedtune.cli.main import main; sys.argv = ['fedtune', 'runs', 'list']; main()")
    assert done.returncode == 2
    assert done.stderr == (
        "fedtune: sqlalchemy is not installed, since this is a device's thin install; "
        "for this command: pip install fedtune\n"
    )


def test_a_module_that_should_be_there_is_no_matter_of_a_thin_install() -> None:
    assert minimal_install.explain_missing_module("torch.nn") is None
    assert minimal_install.explain_missing_module("") is None
    assert str(minimal_install.explain_missing_module("matplotlib.figure")).startswith(
        "matplotlib.figure is not installed"
    )
