"""The in-process engine: executes a run from its last committed round to its end in this process."""

import os

from flwr.app import Context, RecordDict

from fedtune import paths
from fedtune.device.client_app import app as client_app
from fedtune.device.client_app import limited
from fedtune.server.server_app import app as server_app
from fedtune.simulation.compute_devices import uses_accelerator
from fedtune.simulation.in_process_grid import InProcessGrid
from fedtune.simulation.workers import ClientWorkers, ProcessPoolWorkers, SequentialWorkers
from fedtune.training import RunContext

__all__ = ["choose_worker_count", "run_in_process"]

_WORTH_A_POOL = 1_000_000
"""The number of model parameters from which a pool of processes pays off."""


def run_in_process(
    run_context: RunContext, run: str, store: str, workers: int, *, enforce_memory: bool = False
) -> None:
    """Execute a stored run. Clients run one after another in this process, or in a pool of ``workers`` processes.

    With ``enforce_memory``, they run in processes that are held to the memory of the client's device class.
    """
    client_workers = _start_workers(run_context, workers, enforce_memory)
    try:
        config: dict[str, bool | float | int | str] = {
            "run": run,
            "store": store,
            "home": str(paths.get_home_folder()),
            "recipe": "",
        }
        server_app(
            InProcessGrid(run_context.recipe.num_clients, client_workers), Context(1, 1, {}, RecordDict(), config)
        )
    finally:
        client_workers.close()


def _start_workers(run_context: RunContext, workers: int, enforce_memory: bool) -> ClientWorkers:
    if enforce_memory:
        return ProcessPoolWorkers(run_context, workers, limited)
    return ProcessPoolWorkers(run_context, workers) if workers > 1 else SequentialWorkers(client_app)


def choose_worker_count(run_context: RunContext) -> int:
    """Return the number of worker processes: limited by the cores and the cohort.

    It is 1 for small models, and on an accelerator, where clients take turns and the model is held once.
    """
    recipe = run_context.recipe
    if (
        uses_accelerator(recipe)
        or sum(parameter.numel() for parameter in run_context.model.parameters()) < _WORTH_A_POOL
    ):
        return 1
    return max(1, min(recipe.cohort_size, (os.cpu_count() or 1) // recipe.train.threads))
