"""The plan of a stream: which task each client is in, in each round. It is a pure function of the recipe."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from fedtune.recipe.schema import Recipe, Stream
from fedtune.recipe.stream_settings import Staggered, StreamTask
from fedtune.seeds import derive_seed

__all__ = ["Place", "StreamPlan", "find_stream"]


@dataclass(frozen=True)
class Place:
    """Where a client is in a stream.

    ``visit`` 0, 1, ... is the position in the client's order of tasks, ``task`` the number of the task among the
    distinct ones. ``round`` counts from 1 within the visit, which has ``rounds``. ``seen`` are the tasks that the
    client has begun, this one included, in ascending order.
    """

    visit: int
    task: int
    round: int
    rounds: int
    seen: tuple[int, ...]

    @property
    def first(self) -> bool:
        """Whether the task begins with this round."""
        return self.round == 1

    @property
    def last(self) -> bool:
        """Whether the task ends with this round."""
        return self.round == self.rounds


def find_stream(recipe: Recipe) -> Stream | None:
    """Return the stream of a recipe; None if it has none. Its tasks must be listed, as ``resolve_recipe`` lists
    them.
    """
    if recipe.stream is not None and not isinstance(recipe.stream.tasks, list):
        raise RuntimeError("the tasks of a stream are listed before its plan is made")
    return recipe.stream


class StreamPlan:
    """The plan of a recipe's stream."""

    def __init__(self, recipe: Recipe) -> None:
        stream = find_stream(recipe)
        assert stream is not None
        assert isinstance(stream.tasks, list)
        self.stream, self._seed, self._clients = stream, recipe.seed, recipe.num_clients
        self.visits: Sequence[StreamTask] = stream.tasks
        self._ends = list(accumulate(visit.rounds for visit in self.visits))

    @cached_property
    def task_names(self) -> tuple[str, ...]:
        """The names of the distinct tasks, in the order in which they come first."""
        return tuple(dict.fromkeys(visit.name for visit in self.visits))

    @property
    def num_rounds(self) -> int:
        """The rounds of the whole stream."""
        return self._ends[-1] + self.stream.longest_delay

    def find_place(self, round_number: int, client: int) -> Place | None:
        """Return where a client is in a round; None before its first task and after its last one."""
        own = round_number - self._get_delay(client)
        if not 1 <= own <= self._ends[-1]:
            return None
        visit = next(number for number, end in enumerate(self._ends) if own <= end)
        order = self._order_visits(client)
        tasks = [self.task_names.index(self.visits[number].name) for number in order[: visit + 1]]
        rounds = self.visits[order[visit]].rounds
        return Place(visit, tasks[-1], own - (self._ends[visit] - rounds), rounds, tuple(sorted(set(tasks))))

    def find_border(self, round_number: int) -> int | None:
        """Return the visit that ends with a round for the last of the clients; None if none does."""
        ended = round_number - self.stream.longest_delay
        return self._ends.index(ended) if ended in self._ends else None

    def find_border_round(self, visit: int) -> int:
        """Return the round that a visit ends with for the last of the clients."""
        return self._ends[visit] + self.stream.longest_delay

    def find_visit(self, round_number: int) -> int:
        """Return the newest visit that any client is in, in a round; that of round 1 in round 0."""
        return next((number for number, end in enumerate(self._ends) if round_number <= end), len(self._ends) - 1)

    def list_seen(self, round_number: int) -> tuple[int, ...]:
        """Return the tasks that any client has begun by a round, in ascending order."""
        if self.stream.arrival == "own":
            places = (self.find_place(max(1, round_number), client) for client in range(self._clients))
            return tuple(sorted({task for place in places if place for task in place.seen}))
        begun = self.visits[: self.find_visit(round_number) + 1]
        return tuple(sorted({self.task_names.index(visit.name) for visit in begun}))

    def find_task(self, visit: int) -> int:
        """Return the number of a visit's task."""
        return self.task_names.index(self.visits[visit].name)

    def _get_delay(self, client: int) -> int:
        arrival = self.stream.arrival
        return arrival.staggered * (client % arrival.waves) if isinstance(arrival, Staggered) else 0

    def _order_visits(self, client: int) -> list[int]:
        order = list(range(len(self.visits)))
        if self.stream.arrival != "own":
            return order
        drawn: list[int] = np.random.default_rng(derive_seed(self._seed, client, "stream")).permutation(order).tolist()
        return drawn
