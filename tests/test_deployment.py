"""A server and its devices, all real processes: what was simulated is deployed, and what dies comes back."""

import json
import subprocess
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedtune.errors import ServerError
from fedtune.recipe.schema import Recipe
from tests.federations import TRIVIAL, execute, tiny_bert, trivial, words
from tests.servers import FEDTUNE, Server, ended, joined, serving

pytestmark = pytest.mark.slow

TWO = "devices=[{name: toy, count: 2, memory: 64MB}]"


def submit(server: Server, recipe: Recipe) -> str:
    with server.operator() as connection:
        run: str = connection.request_json("POST", "runs", {"recipe": json.loads(recipe.model_dump_json())})["run"]
    return run


def hashes(found: dict[str, Any]) -> list[str]:
    return [record["checkpoint"]["sha256"] for record in found["rounds"]]


def statuses(found: dict[str, Any]) -> set[str]:
    return {sent["status"] for record in found["rounds"] for sent in record["client_records"]}


def command(*argv: str) -> str:
    """What a command prints on this machine."""
    return subprocess.run([*FEDTUNE, *argv], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def server_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("FEDTUNE_OPERATOR_FILE", raising=False)
    home.mkdir()
    return home


def test_a_deployed_run_ends_in_the_bits_of_a_simulated_one(server_home: Path, tmp_path: Path) -> None:
    simulated = execute(trivial(TWO), run="simulated").hashes
    (tmp_path / "recipe.yaml").write_text(TRIVIAL)
    with serving(server_home) as server, joined(server, tmp_path, "partition:0", "partition:1"):
        printed = command("submit", str(tmp_path / "recipe.yaml"), "--set", TWO, "--watch")
        devices, runs, audit = (command("server", view) for view in ("devices", "runs", "audit"))
        found = ended(server, "latest")
    assert (found["status"], found["reason"]) == ("completed", "")
    assert hashes(found) == simulated
    assert statuses(found) == {"merged"}
    assert [one["device_name"] for one in found["assignments"]] == ["device-0", "device-1"]
    assert "round 2/2  2/2 devices  validation accuracy" in printed
    assert printed.splitlines()[-1] == f"run {found['id']} is completed"
    assert devices.count("connected") == 2
    assert f" {found['id']}  completed  2/2 " in runs
    assert f"run {found['id']} submitted" in audit


@pytest.mark.deployed
def test_devices_that_were_not_asked_to_train_score_what_they_score_in_a_simulation(
    server_home: Path, tmp_path: Path
) -> None:
    recipe = trivial(
        "evaluation={own: 0.2, metrics: [f1], clients: all}", "devices=[{count: 3}]", "federation.clients_per_round=1"
    )
    simulated = execute(recipe, run="simulated")
    with (
        serving(server_home) as server,
        joined(server, tmp_path, "partition:0", "partition:1", "partition:2") as devices,
    ):
        found = ended(server, submit(server, recipe), seconds=300)
        said = [device.log for device in devices]
    assert found["status"] == "completed", found["reason"]
    assert hashes(found) == simulated.hashes
    told = [[{**one} for one in record["client_scores"]] for record in found["rounds"]]
    assert told == [[asdict(one) for one in record.client_scores] for record in simulated.rounds]
    assert all(len({one["client"] for one in scores if one["moment"] == "shared"}) == 3 for scores in told[1:])
    assert all(text.count("scored the shared model in") == 2 for text in said)


MIXED = "devices=[{name: large, count: 1, memory: 128MB}, {name: small, count: 1, memory: 64MB, batch: 4}]"


@pytest.mark.deployed
def test_device_classes_do_on_devices_what_they_do_in_a_simulation(server_home: Path, tmp_path: Path) -> None:
    recipe = trivial(MIXED)
    simulated = execute(recipe, run="simulated")
    with serving(server_home) as server, joined(server, tmp_path, "partition:0", "partition:1"):
        found = ended(server, submit(server, recipe))
    assert found["status"] == "completed", found["reason"]
    assert hashes(found) == simulated.hashes
    examples = [sent["num_examples"] for record in found["rounds"] for sent in record["client_records"]]
    assert examples == [20, 8, 20, 8]


@pytest.mark.deployed
def test_devices_are_sent_what_was_added_to_their_base_also_after_their_restart(
    server_home: Path, tmp_path: Path
) -> None:
    lora = "train.techniques=[{lora: {trained_factors: both-and-base, rank: 1}}]"
    recipe = words(tmp_path, lora, "merge=[flora]", TWO, "federation.rounds=4")
    tiny_bert(tmp_path / "bert", width=64)
    simulated = execute(recipe, run="simulated")
    with serving(server_home) as server, joined(server, tmp_path, "partition:0", "partition:1") as devices:
        run = submit(server, recipe)
        at_round(server, run, 2)
        devices[1].process.kill()
        devices[1].process.wait()
        devices[1].again()
        found = ended(server, run)
    assert (found["status"], found["reason"]) == ("completed", "")
    assert hashes(found) == simulated.hashes
    assert [[sent["bytes_down"] for sent in record["client_records"]] for record in found["rounds"]] == [
        [sent.bytes_down for sent in record.client_records] for record in simulated.rounds
    ]


LONG = "federation.rounds=5"


def at_round(server: Server, run: str, number: int) -> None:
    """Wait until a round of a run is committed."""
    end = time.monotonic() + 90
    while time.monotonic() < end:
        with server.operator() as connection:
            found = connection.request_json("GET", f"runs/{run}")
        if found["rounds"] and found["rounds"][-1]["number"] >= number:
            return
        time.sleep(0.05)
    raise AssertionError(f"round {number} did not come: {found['reason']}")


def kill(server: Server, words: str) -> None:
    """kill -9 the first process below the server whose command line holds ``words``."""
    for one in psutil.Process(server.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if words in " ".join(one.cmdline()):
                one.kill()
                return
    raise AssertionError(f"there is no {words}")


@pytest.mark.parametrize("victim", ["flower.app_child", "superexec_child", "superlink_child"])
@pytest.mark.deployed
def test_a_run_goes_on_when_a_process_of_the_server_is_killed(server_home: Path, tmp_path: Path, victim: str) -> None:
    recipe = trivial(TWO, LONG)
    undisturbed = execute(recipe, run="simulated").hashes
    with serving(server_home) as server, joined(server, tmp_path, "partition:0", "partition:1"):
        run = submit(server, recipe)
        at_round(server, run, 1)
        kill(server, victim)
        found = ended(server, run)
    assert found["status"] == "completed", found["reason"]
    assert hashes(found) == undisturbed


@pytest.mark.deployed
def test_a_run_goes_on_when_the_whole_server_is_killed_and_comes_back(server_home: Path, tmp_path: Path) -> None:
    recipe = trivial(TWO, LONG)
    undisturbed = execute(recipe, run="simulated").hashes
    with serving(server_home) as server, joined(server, tmp_path, "partition:0", "partition:1"):
        run = submit(server, recipe)
        at_round(server, run, 1)
        family = psutil.Process(server.process.pid).children(recursive=True)
        server.process.kill()
        _, left = psutil.wait_procs(family, timeout=30)
        assert not left, "its processes end with it"
        with serving(server_home) as again:
            found = ended(again, run)
    assert found["status"] == "completed", found["reason"]
    assert hashes(found) == undisturbed


@pytest.mark.deployed
def test_a_queued_run_waits_for_devices_and_a_stopped_one_is_resumed(server_home: Path, tmp_path: Path) -> None:
    recipe = trivial(TWO, LONG)
    undisturbed = execute(recipe, run="simulated").hashes
    with serving(server_home) as server:
        run = submit(server, recipe)
        other = submit(server, trivial(TWO))
        with joined(server, tmp_path, "partition:0", "partition:1"), server.operator() as connection:
            at_round(server, run, 1)
            assert connection.request_json("GET", f"runs/{other}")["status"] == "queued"
            connection.request_json("POST", f"runs/{other}/stop")
            connection.request_json("POST", f"runs/{run}/stop")
            stopped = ended(server, run)
            assert (stopped["status"], stopped["reason"]) == ("interrupted", "stopped by an operator")
            with pytest.raises(ServerError, match="there is nothing to stop"):
                connection.request_json("POST", f"runs/{run}/stop")
            connection.request_json("POST", f"runs/{run}/resume")
            found = ended(server, run)
    assert found["status"] == "completed", found["reason"]
    assert hashes(found) == undisturbed


@pytest.mark.deployed
def test_a_run_that_cannot_be_is_failed_with_its_reason_and_the_next_one_goes_on(
    server_home: Path, tmp_path: Path
) -> None:
    broken = words(tmp_path, "devices=[{count: 2}]")
    with serving(server_home) as server:
        failed, good = submit(server, broken), submit(server, trivial(TWO))
        (tmp_path / "words.csv").unlink()  # since it was checked
        with joined(server, tmp_path, "partition:0", "partition:1"):
            found = ended(server, failed)
            assert (found["status"], found["rounds"]) == ("failed", [])
            assert "words.csv" in found["reason"]
            assert ended(server, good)["status"] == "completed"
        with pytest.raises(ServerError, match=r"words\.csv"):
            submit(server, broken)
