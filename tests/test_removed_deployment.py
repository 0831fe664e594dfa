"""A real device that is removed in the middle of a run: no round is spent without it, and its successor takes over."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.device.device_home import DeviceHome
from fedtune.device.enrolment import EnrolmentToken, enrol_device
from tests.federations import execute, trivial
from tests.servers import Server, ended, joined, serving
from tests.test_deployment import LONG, TWO, at_round, hashes, statuses, submit

pytestmark = pytest.mark.deployed


@pytest.fixture
def server(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("FEDTUNE_OPERATOR_FILE", raising=False)
    home.mkdir()
    with serving(home) as served:
        yield served


def test_a_device_that_is_removed_and_enrolled_again_costs_no_round_and_no_bit(server: Server, tmp_path: Path) -> None:
    recipe = trivial(TWO, LONG, "federation.quorum=2", "federation.deadline=60")
    undisturbed = execute(recipe, run="simulated").hashes
    with joined(server, tmp_path, "partition:0", "partition:1") as devices:
        run = submit(server, recipe)
        at_round(server, run, 1)
        with server.operator() as connection:
            connection.request_json("DELETE", "devices/device-1")
        devices[1].process.terminate()
        devices[1].process.wait()
        waiting = _waiting(server, run)
        shutil.rmtree(devices[1].home / "device")
        enrol_device(
            DeviceHome(devices[1].home / "device"), None, EnrolmentToken.parse_token(server.token("device-1")), None
        )
        devices[1].again()
        found = ended(server, run)
    assert "device-1 was removed, and too few devices are left for federation.quorum 2; enrol again" in waiting
    assert found["status"] == "completed", found["reason"]
    assert statuses(found) == {"merged"}, "not even the round in which it was removed is lost"
    assert hashes(found) == undisturbed
    assert [one["device_name"] for one in found["assignments"]] == ["device-0", "device-1"]


def _waiting(server: Server, run: str) -> str:
    """What a run says it waits for, once it says so; it is at the same round a while later."""
    end = time.monotonic() + 90
    while True:
        with server.operator() as connection:
            found = connection.request_json("GET", f"runs/{run}")
        if found["reason"].startswith("waits:"):
            break
        assert time.monotonic() < end, found
        time.sleep(0.1)
    time.sleep(3.0)
    with server.operator() as connection:
        later = connection.request_json("GET", f"runs/{run}")
    assert (later["status"], later["rounds_completed"]) == ("running", found["rounds_completed"])
    reason: str = later["reason"]
    return reason
