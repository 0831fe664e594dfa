"""SCAFFOLD on real devices: the bits and the control variates of the simulation."""

from pathlib import Path

import pytest

from fedtune import checkpoint, paths
from fedtune.device.device_home import DeviceHome
from fedtune.device.own_memory import ALGORITHM_PREFIX, MemoryFolder
from tests.federations import execute, trivial
from tests.servers import ended, joined, serving
from tests.test_deployment import hashes, submit

pytestmark = [pytest.mark.slow, pytest.mark.deployed, pytest.mark.timeout(600)]


def hash_variates(folder: Path, run: str) -> str:
    [newest] = MemoryFolder(folder, run, prefix=ALGORITHM_PREFIX).read_earlier(100).values()
    return checkpoint.hash_tensors(newest)


def test_deployed_scaffold_has_the_bits_and_variates_of_a_simulation(home: Path, tmp_path: Path) -> None:
    home.mkdir()
    recipe = trivial(
        "federation.algorithm=scaffold",
        "federation.rounds=3",
        "merge=[mean, {fedavgm: {lr: 0.8, momentum: 0.5}}]",
        "devices=[{name: toy, count: 2}]",
    )
    simulated = execute(recipe, run="simulated").hashes
    own = paths.get_runs_folder() / "simulated" / "own"
    expected = [hash_variates(own / f"client-{client:06d}", "simulated") for client in range(2)]
    with serving(home) as server, joined(server, tmp_path, "partition:0", "partition:1") as seated:
        found = ended(server, submit(server, recipe), seconds=240)
        folders = [DeviceHome(device.home / "device").get_local_state_folder(found["id"]) for device in seated]
        variates = [hash_variates(folder, found["id"]) for folder in folders]
    assert found["status"] == "completed", found["reason"]
    assert hashes(found) == simulated
    assert variates == expected
