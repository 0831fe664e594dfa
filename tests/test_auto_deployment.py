"""``techniques: auto`` on real devices: their plans, the bits of the simulation, and a device that no plan fits."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from fedtune.recipe.schema import Recipe
from fedtune.tracking import Store
from tests.federations import execute, words
from tests.servers import FEDTUNE, ended, joined, serving

pytestmark = [pytest.mark.deployed, pytest.mark.timeout(900)]

DEVICES = [{"name": "laptop", "count": 1, "memory": "3GB"}, {"name": "phone", "count": 2, "memory": "2GB"}]


def test_planned_devices_have_the_bits_of_a_simulation_and_one_that_is_too_small_declines(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDTUNE_OPERATOR_FILE", raising=False)
    home.mkdir()
    settings = json.loads(words(tmp_path).model_dump_json()) | {"devices": DEVICES}
    settings["train"] |= {"techniques": "auto", "local_steps": 1}
    settings["federation"] |= {"rounds": 1, "quorum": 2}
    (tmp_path / "auto.yaml").write_text(yaml.safe_dump(settings))
    with serving(home) as server, joined(server, tmp_path, "partition:0", "partition:1", "partition:2") as devices:
        for device, memory in zip(devices, (3 * 10**9, 2 * 10**9, 10**8), strict=True):
            device.process.terminate()
            device.process.wait(30)
            device.memory = memory
            device.again()
        command = [*FEDTUNE, "submit", str(tmp_path / "auto.yaml"), "--watch"]
        submitted = subprocess.run(command, capture_output=True, text=True, check=True)
        found = ended(server, "latest", 300)
    told = [line for line in submitted.stderr.splitlines() if line.startswith("techniques of ")]
    assert [line.split(":")[0] for line in told] == ["techniques of laptop", "techniques of phone"]
    records = [one for record in found["rounds"] for one in record["client_records"]]
    assert {one["client"]: one["status"] for one in records} == {0: "merged", 1: "merged", 2: "declined"}
    assert all("no plan of the run fits the 100 MB" in one["reason"] for one in records if one["client"] == 2)
    merged = [one for one in records if one["status"] == "merged"]
    # The prediction is of a process that has imported transformers; a device that builds plain blocks takes less.
    assert all(0.1 < one["anonymous_memory"] / one["predicted_anonymous"] < 1.1 for one in merged)
    assert "plan: lora" in devices[0].log
    with Store.open() as store:
        stored = Recipe.model_validate_json(store.run(found["id"]).recipe)
        assert len(store.predictions.list_errors()["laptop"]) == 1
    assert stored.plans is not None
    simulated = execute(stored, run="simulated")
    assert simulated.hashes[0] == found["rounds"][0]["checkpoint"]["sha256"]
    sent = {one.client: one.update_norm for one in simulated.rounds[1].client_records}
    deployed = {one["client"]: one["update_norm"] for one in found["rounds"][1]["client_records"]}
    assert (sent[0], sent[1]) == (deployed[0], deployed[1])
