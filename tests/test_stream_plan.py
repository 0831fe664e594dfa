"""The plan of a stream, and the examples of its tasks."""

from collections import Counter

import numpy as np
import pytest

from fedtune.continual import Place, StreamPlan, number_tasks, select_place_rows
from fedtune.data import Table
from fedtune.data.column import Values, objects
from fedtune.recipe.stream_settings import TimeCuts
from fedtune.training.stream_tasks import list_times  # the rule alone, without data
from tests.streams import make_plan, make_stream_recipe

EQUAL = [{"name": name, "rounds": 2} for name in "abc"]


def test_all_clients_walk_through_the_tasks_together() -> None:
    plan = make_plan()
    assert plan.num_rounds == 6
    assert plan.task_names == ("a", "b")
    found = [plan.find_place(number, 3) for number in range(8)]
    assert found == [
        None,
        Place(0, 0, 1, 2, (0,)),
        Place(0, 0, 2, 2, (0,)),
        Place(1, 1, 1, 3, (0, 1)),
        Place(1, 1, 2, 3, (0, 1)),
        Place(1, 1, 3, 3, (0, 1)),
        Place(2, 0, 1, 1, (0, 1)),
        None,
    ]
    assert [plan.find_border(number) for number in range(1, 7)] == [None, 0, None, None, 1, 2]
    assert [plan.find_border_round(visit) for visit in range(3)] == [2, 5, 6]
    assert [plan.list_seen(number) for number in range(4)] == [(0,), (0,), (0,), (0, 1)]


def test_staggered_clients_begin_late_and_the_border_waits_for_the_last() -> None:
    plan = make_plan(arrival={"staggered": 2, "waves": 2})
    assert plan.num_rounds == 8
    assert plan.find_place(1, 0) == plan.find_place(3, 1) == plan.find_place(1, 2) == Place(0, 0, 1, 2, (0,))
    assert plan.find_place(2, 1) is None
    assert plan.find_place(7, 0) is None
    assert [plan.find_border(number) for number in range(1, 9)] == [None, None, None, 0, None, None, 1, 2]
    assert plan.list_seen(3) == (0, 1)  # client 0 is in b, client 1 in a


def test_own_orders_are_drawn_per_client_and_visit_every_task_once() -> None:
    plan = make_plan(arrival="own", tasks=EQUAL)
    orders = {tuple(plan.find_place(number, client).task for number in (1, 3, 5)) for client in range(4)}  # type: ignore[union-attr]
    assert len(orders) > 1
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    assert plan.find_place(5, 2).seen == (0, 1, 2)  # type: ignore[union-attr]
    assert plan.list_seen(1) == tuple(sorted({plan.find_place(1, client).task for client in range(4)}))  # type: ignore[union-attr]


def test_the_same_recipe_gives_the_same_plan() -> None:
    one, other = make_plan(arrival="own", tasks=EQUAL), make_plan(arrival="own", tasks=EQUAL)
    assert [one.find_place(5, client) for client in range(4)] == [other.find_place(5, client) for client in range(4)]


def _table(column: str, values: list[str]) -> Table:
    return Table({column: Values(objects(values))})


def test_examples_belong_to_the_task_that_names_their_value() -> None:
    tasks = [{"name": "warm", "where": ["red", "orange"], "rounds": 1}, {"name": "blue", "rounds": 1}]
    recipe = make_stream_recipe({"setting": "domain", "by": "colour", "tasks": [*tasks, {"name": "warm", "rounds": 1}]})
    found = number_tasks(recipe, _table("colour", ["blue", "red", "green", "orange"]), ())
    assert found.tolist() == [1, 0, -1, 0]


@pytest.mark.parametrize(
    ("values", "cuts", "expected"),
    [
        (["2024-01-03", "2023-12-31", "2024-06-01", "2025"], ["2024-01", "2024-06"], [1, 0, 2, 2]),
        (["9", "10", "100", "2"], ["10", "50"], [0, 1, 2, 0]),  # as numbers: as text, 9 comes after 100
    ],
)
def test_a_time_stream_is_cut_by_dates_or_numbers(values: list[str], cuts: list[str], expected: list[int]) -> None:

    tasks = [task.model_dump() for task in list_times(TimeCuts(cut=cuts, rounds=1))]
    recipe = make_stream_recipe({"setting": "time", "by": "date", "tasks": tasks})
    assert number_tasks(recipe, _table("date", values), ()).tolist() == expected


def test_without_blur_a_task_has_its_own_examples_alone() -> None:
    plan, tasks = make_plan(tasks=EQUAL), np.array([0, 1, 2, 1, 0, -1])
    place = plan.find_place(3, 0)
    assert place is not None
    assert select_place_rows(plan, place, tasks, np.array([0, 1, 3, 4, 5]), hash).tolist() == [1, 3]


def test_with_blur_every_example_comes_exactly_once_and_a_share_with_the_neighbours() -> None:
    plan = make_plan(tasks=EQUAL, blur=0.4)
    tasks = np.repeat([0, 1, 2], 100)
    rows = np.arange(300)
    found = [select_place_rows(plan, place, tasks, rows, lambda task: task) for place in _places(plan)]
    assert sorted(np.concatenate(found).tolist()) == rows.tolist()
    mixes = [Counter(tasks[part].tolist()) for part in found]
    assert mixes == [{0: 60, 1: 20}, {0: 40, 1: 60, 2: 40}, {1: 20, 2: 60}]


def _places(plan: StreamPlan) -> list[Place]:
    return [place for number in (1, 3, 5) if (place := plan.find_place(number, 0)) is not None]
