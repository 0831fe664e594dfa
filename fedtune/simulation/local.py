"""The local engine: one run from its last committed round to its end, inside this process."""

import os

from flwr.app import Context, RecordDict

from clients.app import app as client_app
from fedtune import home
from fedtune.simulation.local_grid import LocalGrid
from fedtune.simulation.workers import InTurn, Pool, Workers
from fedtune.training import Workshop
from server.app import app as server_app

__all__ = ["default_workers", "run_local"]


def run_local(shop: Workshop, run: str, store: str, workers: int) -> None:
    """Execute a run that the store holds: clients in turn in this process, or in a pool of ``workers`` processes."""
    crew: Workers = Pool(shop, workers) if workers > 1 else InTurn(client_app)
    try:
        config = {"run": run, "store": store, "home": str(home.home()), "recipe": ""}
        server_app(LocalGrid(shop.recipe.clients, crew), Context(1, 1, {}, RecordDict(), config))
    finally:
        crew.close()


def default_workers(clients_per_round: int, threads: int) -> int:
    """As many processes as the processor has room for and a round has work for."""
    return max(1, min(clients_per_round, (os.cpu_count() or 1) // threads))
