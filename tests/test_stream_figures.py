"""The figures of continual learning: closed forms, Avalanche's rule as a twin, and cases that tell variants apart."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from fedtune.tracking.stability_gap import compute_stability_gap
from fedtune.tracking.stream_figures import compute_client_figures, compute_figures, compute_intransigence
from fedtune.tracking.task_matrix import Score, TaskMatrix

START = [0.1, 0.1, 0.1]
HAND = [START, [0.9, 0.2, 0.1], [0.6, 0.8, 0.3], [0.7, 0.5, 0.95]]


def matrix(
    rows: Sequence[Sequence[Score]], visits: Sequence[int] | None = None, examples: Sequence[int | None] = ()
) -> TaskMatrix:
    return TaskMatrix(
        tasks=tuple(f"task-{number}" for number in range(len(rows[0]))),
        visits=tuple(range(len(rows) - 1) if visits is None else visits),
        rows=tuple(tuple(row) for row in rows),
        examples=tuple(examples),
    )


def test_the_figures_of_a_matrix_that_was_worked_out_by_hand() -> None:
    found = compute_figures(matrix(HAND, examples=(100, 100, 200)))
    expected = {
        "accuracy": 2.15 / 3,
        "accuracy_all": (0.7 * 100 + 0.5 * 100 + 0.95 * 200) / 400,
        "incremental": (0.9 + 0.7 + 2.15 / 3) / 3,
        "incremental_all": (0.9 + 0.7 + 0.775) / 3,
        "forgetting": 0.25,
        "forgetting_first": 0.25,
        "bwt": -0.25,
        "bwt_all": -0.8 / 3,
        "fwt": 0.15,
        "fwt_raw": 0.2,
        "learning": 2.65 / 3,
    }
    assert found == {name: pytest.approx(value) for name, value in expected.items()}


def forgetting_of_mammoth(rows: Sequence[Sequence[float]]) -> float:
    """The largest of all rows, also the last, less the last: never negative."""
    earlier = range(len(rows[0]) - 1)
    return sum(max(row[task] for row in rows[1:]) - rows[-1][task] for task in earlier) / len(earlier)


def test_positive_transfer_is_negative_forgetting_and_not_zero() -> None:
    """The published variants agree on most matrices; this one tells them apart."""
    improved = [[0.5, 0.5], [0.5, 0.5], [0.7, 0.9]]
    found = compute_figures(matrix(improved))
    assert found["forgetting"] == pytest.approx(-0.2)
    assert found["forgetting_first"] == pytest.approx(-0.2)
    assert found["bwt"] == pytest.approx(0.2)
    assert forgetting_of_mammoth(improved) == 0


def test_the_best_score_between_first_and_last_tells_chaudhry_from_avalanche() -> None:
    found = compute_figures(matrix([START, [0.5, 0, 0], [0.9, 0.6, 0], [0.4, 0.6, 0.8]]))
    assert found["forgetting"] == pytest.approx((0.5 + 0) / 2)
    assert found["forgetting_first"] == pytest.approx((0.1 + 0) / 2)


class AvalancheTwin:
    """Avalanche's rule, fed one evaluation at a time.

    The first value of an experience is that of the evaluation after its own training, the last one that of any other.
    An experience counts once it was trained before the newest one.
    """

    def __init__(self) -> None:
        self.first: dict[int, float] = {}
        self.last: dict[int, float] = {}
        self.start: dict[int, float] = {}
        self.just_before: dict[int, float] = {}

    def evaluate(self, trained: int | None, row: Sequence[float]) -> None:
        for task, score in enumerate(row):
            if trained is None:
                self.start[task] = score
                continue
            (self.first if task == trained else self.last)[task] = score
            if task == trained + 1:
                self.just_before[task] = score

    def forgetting(self, trained: int) -> float | None:
        lost = [self.first[task] - self.last[task] for task in self.first if task != trained]
        return sum(lost) / len(lost) if lost else None

    def forward_transfer(self, trained: int) -> float | None:
        gained = [self.just_before[task] - self.start[task] for task in range(1, trained + 1)]
        return sum(gained) / len(gained) if gained else None


@pytest.mark.parametrize("seed", range(5))
def test_avalanches_rule_gives_the_same_after_every_row(seed: int) -> None:
    draw = random.Random(seed)
    tasks = draw.randint(2, 6)
    rows = [[draw.random() for _ in range(tasks)] for _ in range(tasks + 1)]
    twin = AvalancheTwin()
    twin.evaluate(None, rows[0])
    for trained, row in enumerate(rows[1:]):
        twin.evaluate(trained, row)
        found = compute_figures(matrix(rows[: trained + 2], visits=range(tasks)))
        assert found["forgetting_first"] == pytest.approx(twin.forgetting(trained))
        assert found["fwt"] == pytest.approx(twin.forward_transfer(trained))


def test_a_stream_of_unseen_classes_has_no_forward_transfer() -> None:
    found = compute_figures(matrix([[None] * 3, [0.9, None, None], [0.6, 0.8, None], [0.5, 0.4, 0.7]]))
    assert (found["fwt"], found["fwt_raw"]) == (None, None)
    assert found["forgetting"] == pytest.approx(0.4)
    assert found["incremental"] == pytest.approx((0.9 + 0.7 + 1.6 / 3) / 3)


def test_one_task_forgets_nothing_and_no_row_gives_no_figure() -> None:
    one = compute_figures(matrix([[0.5], [0.8]]))
    assert (one["accuracy"], one["learning"]) == (0.8, 0.8)
    assert {one[name] for name in ("forgetting", "forgetting_first", "bwt", "bwt_all", "fwt")} == {None}
    assert set(compute_figures(matrix([START], visits=(0, 1, 2))).values()) == {None}
    assert set(compute_figures(TaskMatrix(tasks=(), visits=(), rows=())).values()) == {None}


def test_a_stream_that_has_not_ended_counts_the_tasks_seen_so_far() -> None:
    found = compute_figures(matrix(HAND[:3], visits=(0, 1, 2)))
    assert found["accuracy"] == pytest.approx(0.7)
    assert found["learning"] == pytest.approx(0.85)
    assert found["fwt"] == pytest.approx(0.1)  # the third task's is not complete: it has not ended


def test_a_recurring_task_has_one_column_and_counts_from_its_first_end() -> None:
    rows = [[0.1, 0.1], [0.8, 0.2], [0.5, 0.9], [0.85, 0.6]]
    found = compute_figures(matrix(rows, visits=(0, 1, 0)))
    assert found["accuracy"] == pytest.approx(0.725)
    assert found["learning"] == pytest.approx(0.85)
    assert found["bwt"] == pytest.approx((0.05 - 0.3) / 2)
    assert found["forgetting"] == pytest.approx((-0.05 + 0.3) / 2)
    assert found["incremental"] == pytest.approx((0.8 + 0.7 + 0.725) / 3)


def test_unknown_numbers_of_examples_give_no_weighted_mean() -> None:
    assert compute_figures(matrix(HAND))["accuracy_all"] is None
    assert compute_figures(matrix(HAND, examples=(1, None, 1)))["accuracy_all"] is None


def test_intransigence_needs_the_final_scores_of_a_reference() -> None:
    reference = {"task-0": 0.95, "task-1": 0.9, "task-2": 0.9}
    assert compute_intransigence(matrix(HAND), reference) == pytest.approx((0.05 + 0.1 - 0.05) / 3)
    assert compute_intransigence(matrix(HAND), {"task-1": 0.9}) == pytest.approx(0.1)
    assert compute_intransigence(matrix(HAND), {}) is None


def test_a_client_that_skipped_a_task_counts_from_the_first_row_in_which_it_was_scored() -> None:
    away = matrix([[0.1, 0.1], [None, None], [0.7, 0.8], [0.6, 0.5]], visits=(0, 1, 0))
    assert compute_figures(away)["forgetting"] == pytest.approx((0.1 + 0.3) / 2)
    whole = matrix([[0.1, 0.1], [0.9, 0.1], [0.7, 0.8], [0.6, 0.5]], visits=(0, 1, 0))
    never = matrix([[None, 0.1], [None, 0.2], [None, 0.8], [None, None]], visits=(0, 1, 0))
    gone = matrix([[None, None]] * 4, visits=(0, 1, 0))
    found = compute_client_figures([away, whole, never, gone])
    assert found["forgetting"][0] == pytest.approx(((0.1 + 0.3) / 2 + (0.3 + 0.3) / 2) / 2)
    assert found["learning"][0] == pytest.approx((0.75 + 0.85 + 0.8) / 3)
    assert (found["forgetting"][1], found["learning"][1]) == (2, 3)


def test_the_stability_gap_sees_what_no_border_shows() -> None:
    series = {
        "films": {1: 0.7, 2: 0.9, 3: 0.5, 4: 0.85, 5: 0.8, 6: 0.8},
        "tweets": {3: 0.6, 4: 0.8, 5: 0.7, 6: 0.75},
        "news": {5: 0.6, 6: 0.9},
    }
    found = compute_stability_gap(series, {"films": 2, "tweets": 4, "news": 6})
    assert found is not None
    assert found.gap == pytest.approx(((0.5 - 0.8) + (0.7 - 0.75)) / 2)
    assert found.worst_case == pytest.approx(0.9 / 3 + (1 - 1 / 3) * (0.5 + 0.7) / 2)
    assert compute_stability_gap({"films": {1: 0.7, 2: 0.9}}, {"films": 2}) is None


def test_clients_with_orders_of_their_own_have_figures_of_the_last_row_alone() -> None:
    ordered = matrix(HAND, examples=(100, 100, 200))
    found = compute_figures(replace(ordered, has_order=False))
    assert {name for name, value in found.items() if value is not None} == {"accuracy", "accuracy_all"}
    assert found["accuracy"] == compute_figures(ordered)["accuracy"]
    assert compute_intransigence(replace(ordered, has_order=False), {"task-0": 1.0}) is None
