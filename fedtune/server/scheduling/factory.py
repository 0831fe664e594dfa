"""The recipe and the place decide the scheduler: synchronous or asynchronous, real devices or a simulation."""

from collections.abc import Callable, Mapping
from functools import partial

from flwr.serverapp import Grid

from fedtune.server.run_clients import RunClients
from fedtune.server.scheduling.asynchronous import AsynchronousScheduler
from fedtune.server.scheduling.in_flight import InFlightTracker
from fedtune.server.scheduling.round_scheduler import RoundScheduler, SynchronousScheduler
from fedtune.server.scheduling.simulated_schedule import SimulatedAsynchronousScheduler, make_simulated_schedule
from fedtune.server.scheduling.simulated_time import Simulated
from fedtune.server.selection import check_enough_eligible_clients, list_eligible_clients
from fedtune.training import RunContext
from fedtune.training.stream_place import count_round_examples

__all__ = ["make_round_scheduler"]


def make_round_scheduler(
    grid: Grid,
    context: RunContext,
    clients: RunClients,
    read_last_selected: Callable[[], Mapping[int, int]],
    *,
    on_devices: bool,
) -> RoundScheduler:
    """Make the scheduler that the recipe asks for; devices were selected already when they were assigned."""
    recipe, federation = context.recipe, context.recipe.federation
    if not on_devices:
        check_enough_eligible_clients(recipe)
    eligible = range(recipe.num_clients) if on_devices else list_eligible_clients(recipe)
    if on_devices and federation.asynchronous is not None:
        tracker = InFlightTracker(recipe, eligible, federation.asynchronous)
        return AsynchronousScheduler(
            grid, tracker, federation.asynchronous.buffer_size, federation.deadline, clients.poll, read_last_selected
        )
    if on_devices:
        return SynchronousScheduler(grid, recipe, eligible, clients.poll, read_last_selected)
    if federation.asynchronous is not None:
        sizes = [len(rows) for rows in context.client_rows]
        return SimulatedAsynchronousScheduler(
            grid, make_simulated_schedule(recipe, eligible, sizes, federation.asynchronous), clients.poll
        )
    count = partial(count_round_examples, context)
    return Simulated(grid, recipe, eligible, count, clients.poll, read_last_selected)
