"""Scalars of seeds on real devices and in a pool of processes: the bits of a simulation in one process."""

from pathlib import Path

import pytest

from fedtune.simulation.workers import ProcessPoolWorkers
from fedtune.training import get_run_context
from tests.federations import execute, words
from tests.servers import ended, joined, serving
from tests.test_deployment import hashes, submit
from tests.test_fedkseed import ADAPTERS, SGD

pytestmark = [pytest.mark.slow, pytest.mark.deployed, pytest.mark.timeout(600)]


@pytest.mark.parametrize("units", [ADAPTERS, '[{"lora": {"rank": 2}}, "mezo"]'])
def test_deployed_runs_have_the_bits_of_a_simulation(home: Path, tmp_path: Path, units: str) -> None:
    home.mkdir()
    more = ("federation.rounds=2", "devices=[{name: toy, count: 2}]", "train.lr=0.01")
    recipe = words(tmp_path, f"train.techniques={units}", *SGD, *more)
    simulated = execute(recipe, run="simulated").hashes
    pool = execute(recipe, ProcessPoolWorkers(get_run_context(recipe.model_dump_json()), 2), run="pool").hashes
    assert pool == simulated
    with serving(home) as server, joined(server, tmp_path, "partition:0", "partition:1"):
        found = ended(server, submit(server, recipe), seconds=240)
    assert found["status"] == "completed", found["reason"]
    assert hashes(found) == simulated
