"""An alarm may open a new task: the visit of a task ends early, and the rest of its rounds is another visit.

The new visit has the same name, because nobody knows what the changed examples have in common. What happens at the end
of a task happens at this border too.
"""

from itertools import accumulate

from fedtune.recipe.schema import Recipe
from fedtune.recipe.stream_settings import StreamTask

__all__ = ["can_end_visit", "end_visit"]


def can_end_visit(recipe: Recipe, last_round: int) -> bool:
    """Whether a visit can end early with a round: it is inside one, not at its end."""
    return last_round >= 1 and _find_visit(_list_visits(recipe), last_round) is not None


def end_visit(recipe: Recipe, last_round: int) -> Recipe:
    """Return the recipe with the visit that includes a round ended by it, and the rest of its rounds as a new visit."""
    visits = _list_visits(recipe)
    place = _find_visit(visits, last_round)
    assert recipe.stream is not None
    if place is None:
        raise ValueError(f"no visit can end early with round {last_round}")
    number, rounds = place
    first = visits[number].model_copy(update={"rounds": rounds})
    rest = StreamTask(name=first.name, rounds=visits[number].rounds - rounds)
    stream = recipe.stream.model_copy(update={"tasks": [*visits[:number], first, rest, *visits[number + 1 :]]})
    return recipe.model_copy(update={"stream": stream})


def _list_visits(recipe: Recipe) -> list[StreamTask]:
    assert recipe.stream is not None
    assert isinstance(recipe.stream.tasks, list)
    return recipe.stream.tasks


def _find_visit(visits: list[StreamTask], last_round: int) -> tuple[int, int] | None:
    """Return the visit that a round lies inside, and how many of its rounds are over then; None at a border."""
    ends = list(accumulate(visit.rounds for visit in visits))
    for number, end in enumerate(ends):
        if last_round < end:
            rounds = last_round - (end - visits[number].rounds)
            return (number, rounds) if rounds > 0 else None
    return None
