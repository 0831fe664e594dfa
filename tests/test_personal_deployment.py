"""Kept tensors and own models on real devices: the bits of the simulation, in the shared state and on the devices."""

from pathlib import Path

import pytest

from fedtune import checkpoint, paths
from fedtune.device import local_state
from fedtune.device.device_home import DeviceHome
from fedtune.device.own_memory import ALGORITHM_PREFIX, MemoryFolder
from tests.federations import execute, words
from tests.servers import ended, joined, serving
from tests.test_deployment import hashes, submit

pytestmark = [pytest.mark.slow, pytest.mark.deployed, pytest.mark.timeout(600)]


def hash_kept(folder: Path, run: str) -> str:
    """The digest of the newest tensors that a device keeps, of whichever kind."""
    found = MemoryFolder(folder, run, prefix=ALGORITHM_PREFIX).read_earlier(100)
    [newest] = found.values() or [local_state.load_local_state(folder, 100)]
    assert newest
    return checkpoint.hash_tensors(newest)


@pytest.mark.parametrize("unit", ["fedrep", "ditto"])
def test_real_devices_keep_the_tensors_of_a_simulation(home: Path, tmp_path: Path, unit: str) -> None:
    home.mkdir()
    recipe = words(
        tmp_path,
        f"federation.algorithm={unit}",
        "federation.rounds=3",
        "evaluation.local_holdout=0.25",
        "devices=[{name: toy, count: 2}]",
    )
    simulated = execute(recipe, run="simulated").hashes
    own = paths.get_runs_folder() / "simulated" / "own"
    expected = [hash_kept(own / f"client-{client:06d}", "simulated") for client in range(2)]
    with serving(home) as server, joined(server, tmp_path, "partition:0", "partition:1") as seated:
        found = ended(server, submit(server, recipe), seconds=300)
        folders = [DeviceHome(device.home / "device").get_local_state_folder(found["id"]) for device in seated]
        kept = [hash_kept(folder, found["id"]) for folder in folders]
    assert found["status"] == "completed", found["reason"]
    assert hashes(found) == simulated
    assert kept == expected
