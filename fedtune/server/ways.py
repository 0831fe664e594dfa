"""How a run's clients are asked: all at once, or as they come, on real devices or in a simulation."""

from collections.abc import Callable, Mapping

from flwr.serverapp import Grid

from fedtune.server.asking import Asking, Together
from fedtune.server.buffered import Buffered
from fedtune.server.crew import Crew
from fedtune.server.desk import Desk
from fedtune.server.selection import candidates, check_simulated
from fedtune.server.simulated_time import Simulated
from fedtune.server.timetable import ByTimetable, timetable
from fedtune.training import Workshop

__all__ = ["way_of_asking"]


def way_of_asking(
    grid: Grid, shop: Workshop, crew: Crew, seated: bool, last: Callable[[], Mapping[int, int]]
) -> Asking:
    """What the recipe asks for. Devices were selected when they were ``seated``; a simulation's clients are here."""
    recipe, federation = shop.recipe, shop.recipe.federation
    if not seated:
        check_simulated(recipe)
    among = range(recipe.clients) if seated else candidates(recipe)
    if seated and federation.late is not None:
        desk = Desk(recipe, among, federation.late)
        return Buffered(grid, desk, federation.late.buffer, federation.deadline, crew.poll, last)
    if seated:
        return Together(grid, recipe, among, crew.poll, last)
    sizes = [len(rows) for rows in shop.clients]
    if federation.late is not None:
        return ByTimetable(grid, timetable(recipe, among, sizes, federation.late), crew.poll)
    return Simulated(grid, recipe, among, sizes, crew.poll, last)
