"""Privacy between real processes: the bits of a simulation that is given the same secrets, and no others."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from fedtune.device.device_home import DeviceHome
from tests.federations import execute
from tests.private_federations import epsilons, key_of, private
from tests.servers import Device, ended, joined, serving
from tests.test_deployment import hashes, statuses, submit

pytestmark = pytest.mark.deployed

TWO = "devices=[{name: toy, count: 2, memory: 64MB}]"


@pytest.mark.parametrize("where", ["server", "client"])
def test_a_private_run_on_devices_is_the_simulated_one_with_their_secrets(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.delenv("FEDTUNE_OPERATOR_FILE", raising=False)
    home.mkdir()
    recipe = private(where, TWO)
    with serving(home) as server, joined(server, tmp_path, "partition:0", "partition:1") as devices:
        found = ended(server, submit(server, recipe))
    assert (found["status"], statuses(found)) == ("completed", {"merged"}), found["reason"]
    of_server, of_devices = key_of(found["id"]), secrets(found, devices)
    assert of_server.exists() == (where == "server")
    assert [key.exists() for key in of_devices] == [where == "client"] * 2

    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "elsewhere"))
    for client, key in [(None, of_server), *enumerate(of_devices)]:
        if key.exists():
            copied = key_of(found["id"], client)
            copied.parent.mkdir(parents=True)
            shutil.copy(key, copied)
    simulated = execute(recipe, run=found["id"])
    assert hashes(found) == simulated.hashes
    assert [m["value"] for m in found["metrics"] if m["split"] == "privacy"] == epsilons(simulated)
    assert hashes(found)[1:] != execute(recipe, run="other secrets").hashes[1:]


def secrets(found: dict[str, Any], devices: list[Device]) -> list[Path]:
    """Where the devices' secrets would lie, by the clients they were."""
    by_name = {device.name: device for device in devices}
    seated = [by_name[one["device_name"]] for one in found["assignments"]]
    return [DeviceHome(device.home / "device").get_local_state_folder(found["id"]) / "noise.key" for device in seated]
