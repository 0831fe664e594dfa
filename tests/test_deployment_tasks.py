"""Each way to set a task, on one server and two devices: the bits of every round are those of the simulation."""

from pathlib import Path

import pytest

from tests.federations import execute
from tests.servers import ended, joined, serving
from tests.task_cases import CASES, task_recipe
from tests.test_deployment import hashes, statuses, submit

ROUNDS = "federation.rounds=2"


@pytest.mark.slow
@pytest.mark.deployed
@pytest.mark.timeout(900)
def test_deployed_tasks_end_in_the_bits_of_simulated_ones(home: Path, tmp_path: Path) -> None:
    """The devices stay for all cases, one run after the other, as they would at home."""
    home.mkdir()
    recipes = {}
    for number, case in enumerate(CASES):
        (tmp_path / f"case-{number}").mkdir()
        recipes[case] = task_recipe(case, tmp_path / f"case-{number}", ROUNDS)
    simulated = {case: execute(recipe, run=f"simulated-{n}").hashes for n, (case, recipe) in enumerate(recipes.items())}
    deployed: dict[str, list[str]] = {}
    sent: set[str] = set()
    with serving(home) as server, joined(server, tmp_path, "partition:0", "partition:1"):
        for case, recipe in recipes.items():
            found = ended(server, submit(server, recipe), seconds=240)
            assert found["status"] == "completed", (case, found["reason"])
            deployed[case] = hashes(found)
            sent |= statuses(found)
    assert deployed == simulated
    assert sent == {"merged"}
    last = [found[-1] for found in simulated.values()]
    assert len(set(last)) == len(CASES), "each case trains something else"
    assert all(found[0] != found[-1] for found in simulated.values())
