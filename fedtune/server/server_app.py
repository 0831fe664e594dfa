"""The Flower ServerApp: it opens the run that its context names, and executes it."""

import os
from contextlib import nullcontext

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedtune.errors import FedtuneError, StoreError
from fedtune.flower.guarded_grid import guard_grid
from fedtune.logs import record_output
from fedtune.parent_watchdog import exit_when_parent_dies
from fedtune.server.round_loop import run_rounds
from fedtune.tracking import Store, claim_run
from fedtune.training import clear_run_context, get_run_context

__all__ = ["app"]

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run ``run`` of the store ``store``; its recipe is stored with it. ``home`` is fedtune's home folder."""
    config = {key: str(value) for key, value in context.run_config.items()}
    os.environ["FEDTUNE_HOME"] = config["home"]
    exit_when_parent_dies()
    with claim_run(config["run"]), Store.open(config["store"]) as store:
        # A simulation has no assigned devices, and its process has its own terminal.
        deployed = bool(store.access.list_assignments(config["run"]))
        with record_output(config["run"]) if deployed else nullcontext():
            run_to_completion(guard_grid(grid), store, config["run"])


def run_to_completion(grid: Grid, store: Store, run: str) -> None:
    """Coordinate a run and record how it ended."""
    try:
        run_context = get_run_context(store.run(run).recipe)
        store.record_recipe(run, run_context.recipe.model_dump_json())
        reason = run_rounds(grid, run_context, store, run)
    except KeyboardInterrupt:
        store.finish(run, "interrupted", "stopped by the user")
        raise
    except FedtuneError as error:
        # A server continues the run when the disk or the database works again.
        if not (isinstance(error, StoreError) and store.access.list_assignments(run)):
            store.finish(run, "failed", str(error))
        raise
    finally:
        clear_run_context()
    store.finish(run, "completed", reason)
