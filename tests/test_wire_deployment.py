"""Coded messages on real devices: the bits, the bytes and the estimates of the simulation."""

from pathlib import Path

import pytest

from fedtune import checkpoint, paths
from fedtune.device.device_home import DeviceHome
from fedtune.device.own_memory import FEEDBACK_PREFIX, MemoryFolder
from tests.federations import execute, trivial
from tests.servers import ended, joined, serving
from tests.test_deployment import hashes, submit

pytestmark = [pytest.mark.slow, pytest.mark.deployed, pytest.mark.timeout(600)]


def hash_estimates(folder: Path, run: str) -> str:
    [newest] = MemoryFolder(folder, run, prefix=FEEDBACK_PREFIX).read_earlier(100).values()
    return checkpoint.hash_tensors(newest)


def test_deployed_messages_are_those_of_a_simulation(home: Path, tmp_path: Path) -> None:
    home.mkdir()
    recipe = trivial(
        "wire={up: [{low-rank: {rank: 3}}, top-k, int8, zstd], down: [int8, zstd], error_feedback: ef21}",
        "federation.rounds=3",
        "devices=[{name: toy, count: 2}]",
    )
    simulated = execute(recipe, run="simulated")
    own = paths.get_runs_folder() / "simulated" / "own"
    expected = [hash_estimates(own / f"client-{client:06d}", "simulated") for client in range(2)]
    with serving(home) as server, joined(server, tmp_path, "partition:0", "partition:1") as seated:
        found = ended(server, submit(server, recipe), seconds=240)
        folders = [DeviceHome(device.home / "device").get_local_state_folder(found["id"]) for device in seated]
        estimates = [hash_estimates(folder, found["id"]) for folder in folders]
    assert found["status"] == "completed", found["reason"]
    assert hashes(found) == simulated.hashes
    assert estimates == expected
    for number in (1, 2, 3):
        sent = [(one["bytes_up"], one["bytes_down"]) for one in found["rounds"][number]["client_records"]]
        records = simulated.rounds[number].client_records
        assert sent == [(one.bytes_up, one.bytes_down) for one in records]
        assert max(max(one) for one in sent) < 10_000 < 31_560, "a tensor in single precision has 31 kB"
