"""Stored examples on real devices: the bits and the files of the simulation."""

from pathlib import Path

import pytest

from fedtune import checkpoint, paths
from fedtune.device.device_home import DeviceHome
from fedtune.device.memory_key import get_key_path
from tests.federations import execute
from tests.replay_rounds import read_files
from tests.servers import ended, joined, serving
from tests.streams import CLASSES, resolve_stream
from tests.test_deployment import hashes, submit

pytestmark = [pytest.mark.slow, pytest.mark.deployed, pytest.mark.timeout(600)]


def hash_files(folder: Path, run: str, key: bytes | None = None) -> dict[int, str]:
    return {visit: checkpoint.hash_tensors(one) for visit, one in read_files(folder, run, key).items()}


def test_deployed_replay_has_the_bits_and_files_of_a_simulation(home: Path, tmp_path: Path) -> None:
    home.mkdir()
    stream = {**CLASSES, "memory": [{"replay": {"share": "20%"}}], "own_memory": {"budget": "50KB"}}
    devices = [{"name": "toy", "count": 2}]
    simulated = execute(resolve_stream(stream, devices=devices), run="simulated").hashes
    own = paths.get_runs_folder() / "simulated" / "own"
    expected = [hash_files(own / f"client-{client:06d}", "simulated") for client in range(2)]
    stream["own_memory"] = {"budget": "50KB", "encrypted": True}
    recipe = resolve_stream(stream, devices=devices)
    with serving(home) as server, joined(server, tmp_path, "partition:0", "partition:1") as seated:
        found = ended(server, submit(server, recipe), seconds=240)
        folders = [DeviceHome(device.home / "device").get_local_state_folder(found["id"]) for device in seated]
        files = [hash_files(folder, found["id"], get_key_path(folder).read_bytes()) for folder in folders]
    assert found["status"] == "completed", found["reason"]
    assert hashes(found) == simulated
    assert files == expected
    assert all(sum(path.stat().st_size for path in folder.glob("memory-*")) <= 50_000 for folder in folders)
