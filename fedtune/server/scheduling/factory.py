"""How a run's clients are asked: all at once, or as they come, on real devices or in a simulation."""

from collections.abc import Callable, Mapping

from flwr.serverapp import Grid

from fedtune.server.run_clients import RunClients
from fedtune.server.scheduling.asynchronous import AsynchronousScheduler
from fedtune.server.scheduling.in_flight import InFlightTracker
from fedtune.server.scheduling.round_scheduler import RoundScheduler, SynchronousScheduler
from fedtune.server.scheduling.simulated_schedule import SimulatedAsynchronousScheduler, make_simulated_schedule
from fedtune.server.scheduling.simulated_time import Simulated
from fedtune.server.selection import check_enough_eligible_clients, list_eligible_clients
from fedtune.training import RunContext

__all__ = ["make_round_scheduler"]


def make_round_scheduler(
    grid: Grid, shop: RunContext, crew: RunClients, seated: bool, last: Callable[[], Mapping[int, int]]
) -> RoundScheduler:
    """What the recipe asks for. Devices were selected when they were ``seated``; a simulation's clients are here."""
    recipe, federation = shop.recipe, shop.recipe.federation
    if not seated:
        check_enough_eligible_clients(recipe)
    among = range(recipe.num_clients) if seated else list_eligible_clients(recipe)
    if seated and federation.asynchronous is not None:
        desk = InFlightTracker(recipe, among, federation.asynchronous)
        return AsynchronousScheduler(
            grid, desk, federation.asynchronous.buffer_size, federation.deadline, crew.poll, last
        )
    if seated:
        return SynchronousScheduler(grid, recipe, among, crew.poll, last)
    sizes = [len(rows) for rows in shop.client_rows]
    if federation.asynchronous is not None:
        return SimulatedAsynchronousScheduler(
            grid, make_simulated_schedule(recipe, among, sizes, federation.asynchronous), crew.poll
        )
    return Simulated(grid, recipe, among, sizes, crew.poll, last)
