"""The local engine: one run from its last committed round to its end, inside this process."""

import os

from flwr.app import Context, RecordDict

from fedtune import home
from fedtune.device.client_app import app as client_app
from fedtune.server.server_app import app as server_app
from fedtune.simulation.local_grid import LocalGrid
from fedtune.simulation.workers import InTurn, Pool, Workers
from fedtune.training import Workshop

__all__ = ["default_workers", "run_local"]

_WORTH_A_POOL = 1_000_000
"""Parameters of a model from which on starting worker processes pays."""


def run_local(shop: Workshop, run: str, store: str, workers: int) -> None:
    """Execute a run that the store holds: clients in turn in this process, or in a pool of ``workers`` processes."""
    crew: Workers = Pool(shop, workers) if workers > 1 else InTurn(client_app)
    try:
        config: dict[str, bool | float | int | str] = {
            "run": run,
            "store": store,
            "home": str(home.home()),
            "recipe": "",
        }
        server_app(LocalGrid(shop.recipe.clients, crew), Context(1, 1, {}, RecordDict(), config))
    finally:
        crew.close()


def default_workers(shop: Workshop) -> int:
    """As many processes as there are cores and clients for; one where clients are done before a pool would start."""
    recipe = shop.recipe
    if sum(parameter.numel() for parameter in shop.model.parameters()) < _WORTH_A_POOL:
        return 1
    return max(1, min(recipe.clients_per_round, (os.cpu_count() or 1) // recipe.train.threads))
