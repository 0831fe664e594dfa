"""Runs that break off in a round, after its merge and before its commit, and are resumed, all in this process."""

from typing import Any

import pytest

from fedtune.device.client_app import app
from fedtune.recipe.schema import Recipe
from fedtune.server import round_loop
from fedtune.server.round_commit import commit_round
from fedtune.server.server_app import run_to_completion
from fedtune.simulation.in_process_grid import InProcessGrid
from fedtune.simulation.workers import SequentialWorkers
from fedtune.tracking import Store, claim_run
from fedtune.training import clear_run_context
from tests.federations import Ended, execute, outcome, silent

__all__ = ["kill_and_resume"]


def kill_and_resume(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, run: str = "killed", at: int = 2) -> Ended:
    """Begin a run that breaks off in round ``at``, resume it from the store and the files, and return its end."""

    def die(store: Any, run_id: str, number: int, result: Any) -> Any:
        if number == at:
            raise KeyboardInterrupt
        return commit_round(store, run_id, number, result)

    with monkeypatch.context() as patch:
        patch.setattr(round_loop, "commit_round", die)
        with pytest.raises(KeyboardInterrupt):
            execute(recipe, run=run)
    clear_run_context()
    with Store.open() as store, claim_run(run), silent():
        run_to_completion(InProcessGrid(recipe.num_clients, SequentialWorkers(app)), store, run)
    return outcome(run)
