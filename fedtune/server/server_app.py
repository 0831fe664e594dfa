"""The Flower ServerApp: opens the run a context names and carries it to its end."""

import os
from contextlib import nullcontext

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedtune.errors import FedtuneError, StoreError
from fedtune.server.guarded_grid import guard_grid
from fedtune.server.lifeline import end_with_keeper
from fedtune.server.logs import recorded
from fedtune.server.rounds import coordinate
from fedtune.tracking import Store, claim
from fedtune.training import discard, workshop

__all__ = ["app"]

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run ``run`` of the store ``store``; its recipe is stored with it. ``home`` is fedtune's home folder."""
    config = {key: str(value) for key, value in context.run_config.items()}
    os.environ["FEDTUNE_HOME"] = config["home"]
    end_with_keeper()
    with claim(config["run"]), Store.open(config["store"]) as store:
        deployed = bool(store.access.seats(config["run"]))  # a simulation's process has a terminal of its own
        with recorded(config["run"]) if deployed else nullcontext():
            carry(guard_grid(grid), store, config["run"])


def carry(grid: Grid, store: Store, run: str) -> None:
    """Coordinate a run and record how it ended."""
    try:
        shop = workshop(store.run(run).recipe)
        store.record_recipe(run, shop.recipe.model_dump_json())
        coordinate(grid, shop, store, run)
    except KeyboardInterrupt:
        store.finish(run, "interrupted", "stopped by the user")
        raise
    except FedtuneError as error:
        if not (isinstance(error, StoreError) and store.access.seats(run)):  # a server goes on when the disk or the
            store.finish(run, "failed", str(error))  # database is well again
        raise
    finally:
        discard()
    store.finish(run, "completed")
