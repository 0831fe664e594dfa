"""Late answers of real devices: one that was frozen is merged when it comes, and a killed server goes on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.federations import trivial
from tests.servers import Device, Server, ended, joined, serving
from tests.test_deployment import submit
from tests.test_device_deployment import DIES_WITH_AN_ORDER_IN_HAND

pytestmark = pytest.mark.deployed

PARTS = ("partition:0", "partition:1", "partition:2")


@pytest.fixture
def server_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("FEDTUNE_OPERATOR_FILE", raising=False)
    home.mkdir()
    return home


def submit_late(server: Server, *overrides: str) -> str:
    devices = "devices=[{name: toy, count: 3, memory: 64MB}]"
    return submit(server, trivial(devices, "federation.asynchronous={buffer: 2, oldest: 50}", *overrides))


def rounds(server: Server, run: str) -> int:
    with server.operator() as connection:
        return len(connection.request_json("GET", f"runs/{run}")["rounds"]) - 1


def until_round(server: Server, run: str, number: int) -> None:
    end = time.monotonic() + 120
    while rounds(server, run) < number:
        assert time.monotonic() < end, "no round goes by"
        time.sleep(0.1)


@contextmanager
def frozen(device: Device) -> Iterator[None]:
    process = psutil.Process(device.process.pid)
    every = [process, *process.children(recursive=True)]
    for one in every:
        one.suspend()
    yield
    for one in every:
        one.resume()


def test_rounds_go_on_without_a_frozen_device_whose_answer_is_merged_when_it_comes(
    server_home: Path, tmp_path: Path
) -> None:
    with serving(server_home) as server, joined(server, tmp_path, *PARTS) as devices:
        run = submit_late(server, "federation.rounds=14")
        until_round(server, run, 2)
        with frozen(devices[2]):
            stopped_at = rounds(server, run)
            until_round(server, run, stopped_at + 4)
        found = ended(server, run, 300)
    assert found["status"] == "completed"
    sent = [one for record in found["rounds"] for one in record["client_records"]]
    assert {one["status"] for one in sent} == {"merged"}
    lateness = [one["staleness"] for one in sent if one["device_name"] == "device-2"]
    assert max(lateness) >= 2
    assert [len(record["client_records"]) for record in found["rounds"][1:]] == [2] * 14
    accuracy = [m["value"] for m in found["metrics"] if (m["split"], m["name"]) == ("validation", "accuracy")]
    assert accuracy[-1] > accuracy[0] + 0.1


def test_a_killed_server_goes_on_from_its_last_round(server_home: Path, tmp_path: Path) -> None:
    with serving(server_home) as server, joined(server, tmp_path, *PARTS):
        run = submit_late(server, "federation.rounds=8")
        until_round(server, run, 3)
        for process in psutil.Process(server.process.pid).children(recursive=True):
            process.kill()
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        with serving(server_home) as again:
            found = ended(again, run, 300)
    assert found["status"] == "completed"
    assert [record["number"] for record in found["rounds"]] == list(range(9))
    assert {one["status"] for record in found["rounds"] for one in record["client_records"]} == {"merged"}


def test_an_order_that_died_with_its_device_is_handed_out_again_and_merged_late(
    server_home: Path, tmp_path: Path
) -> None:
    with serving(server_home) as server, joined(server, tmp_path, *PARTS) as devices:
        devices[2].process.kill()
        devices[2].process.wait()
        words = [sys.executable, "-c", DIES_WITH_AN_ORDER_IN_HAND, "device", "join", "--data", devices[2].source]
        planted = subprocess.Popen(words, env={**os.environ, "FEDTUNE_HOME": str(devices[2].home)})
        run = submit_late(server, "federation.rounds=14")
        assert planted.wait(120) == -signal.SIGKILL
        died_at = rounds(server, run)
        until_round(server, run, died_at + 3)
        devices[2].again()
        found = ended(server, run, 300)
    sent = [one for record in found["rounds"] for one in record["client_records"]]
    assert {one["status"] for one in sent} == {"merged"}
    lateness = [one["staleness"] for one in sent if one["device_name"] == "device-2"]
    assert lateness, "it takes part again"
    assert max(lateness) >= 2
