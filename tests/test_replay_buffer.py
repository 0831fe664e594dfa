"""The replay buffer: which examples are chosen, whatever the order in which they come."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from fedtune.continual._buffer import Candidate, Choice, choose_examples, hash_example


def make_candidates(count: int, groups: int, *, sizes: tuple[int, int] = (10, 10), seed: int = 0) -> list[Candidate]:
    numbers = random.Random(seed)
    keys = [hash_example(seed, 1, str(row).encode()) for row in range(count)]
    return [Candidate(key, numbers.randrange(groups), numbers.randint(*sizes)) for key in keys]


def choose(candidates: list[Candidate], budget: int, **settings: bool) -> list[Candidate]:
    return [candidates[place] for place in choose_examples(candidates, {}, budget, **settings).places]


def choose_in_parts(
    parts: list[list[Candidate]], budget: int, **settings: bool
) -> tuple[list[Candidate], dict[int, bytes]]:
    """As a device does: after each part it has what it kept, and the part."""
    kept: list[Candidate] = []
    limits: dict[int, bytes] = {}
    for part in parts:
        offered = kept + part
        choice = choose_examples(offered, limits, budget, **settings)
        kept, limits = [offered[place] for place in choice.places], choice.limits
    return kept, limits


def test_every_example_is_chosen_equally_often() -> None:
    """10,000 seeds choose 5 of 20 examples; chi-squared over the examples, and over their pairs."""
    contents = [str(row).encode() for row in range(20)]
    counts, pairs = Counter[int](), Counter[tuple[int, int]]()
    for seed in range(10_000):
        candidates = [Candidate(hash_example(seed, 3, content), 0, 1) for content in contents]
        chosen = sorted(choose_examples(candidates, {}, 5).places)
        assert len(chosen) == 5
        counts.update(chosen)
        pairs.update(itertools.combinations(chosen, 2))
    # The counts have the covariance of draws without replacement: k/n (1 - k/n) n/(n - 1) of centred unit vectors.
    spread = sum((counts[row] - 2500) ** 2 for row in range(20)) / (10_000 * 0.25 * 0.75 * 20 / 19)
    assert 0.001 < stats.chi2.sf(spread, 19) < 0.999
    expected = 10_000 * 5 * 4 / (20 * 19)
    assert max(abs(pairs[pair] - expected) for pair in itertools.combinations(range(20), 2)) < 5 * expected**0.5


def test_clients_keep_different_examples_and_machines_the_same_ones() -> None:
    contents = [str(row).encode() for row in range(100)]

    def list_kept(client: int, order: list[bytes]) -> set[bytes]:
        candidates = [Candidate(hash_example(7, client, content), 0, 1) for content in order]
        return {order[place] for place in choose_examples(candidates, {}, 20).places}

    assert list_kept(1, contents) == list_kept(1, contents[::-1]) != list_kept(2, contents)


@pytest.mark.parametrize("equal_sizes", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_order_and_parts_change_nothing(groups: int, equal_sizes: bool) -> None:
    for seed in range(60):
        sizes = (10, 10) if equal_sizes else (1, 30)
        candidates = make_candidates(40, groups, sizes=sizes, seed=seed)
        whole = choose_examples(candidates, {}, 173, equal_sizes=equal_sizes)
        shuffled = random.Random(seed).sample(candidates, len(candidates))
        stops = sorted(random.Random(seed).sample(range(41), 4))
        parts = [shuffled[start:stop] for start, stop in itertools.pairwise([0, *stops, 40])]
        kept, limits = choose_in_parts(parts, 173, equal_sizes=equal_sizes)
        assert kept == [candidates[place] for place in whole.places]
        assert limits == whole.limits
        assert choose_in_parts([*parts, *parts], 173, equal_sizes=equal_sizes) == (kept, limits)  # met again


def test_groups_that_arrive_one_after_another_give_the_same_choice() -> None:
    """A class stream: each part brings new groups, which take from those before them."""
    for seed in range(60):
        candidates = make_candidates(60, 6, sizes=(1, 30), seed=seed)
        parts = [[one for one in candidates if one.group // 2 == task] for task in range(3)]
        kept, _ = choose_in_parts(parts, 200)
        assert kept == choose(candidates, 200)


def test_a_smaller_budget_keeps_a_subset() -> None:
    for groups, budget in itertools.product((1, 3), range(0, 400, 7)):
        candidates = make_candidates(50, groups, sizes=(1, 30), seed=budget)
        fewer, more = set(choose(candidates, budget)), set(choose(candidates, budget + 50))
        assert fewer <= more
        assert sum(one.size for one in more) <= budget + 50


def test_equal_examples_count_once_with_the_lowest_group() -> None:
    key = hash_example(0, 0, b"same")
    choice = choose_examples([Candidate(key, 2, 10), Candidate(key, 1, 10), Candidate(b"z", 2, 10)], {}, 20)
    assert choice == Choice([0, 2], {})


def test_classes_share_equally_and_the_remainder_goes_to_the_lowest() -> None:
    candidates = make_candidates(300, 3)
    assert Counter(one.group for one in choose(candidates, 110, equal_sizes=True)) == {0: 4, 1: 4, 2: 3}
    assert Counter(one.group for one in choose(candidates, 20, equal_sizes=True)) == {0: 1, 1: 1}
    assert Counter(one.group for one in choose(candidates, 20)) == {}


def test_a_rare_class_leaves_its_part_to_the_others() -> None:
    rare = [one for one in make_candidates(300, 3) if one.group != 1]
    candidates = [*rare, Candidate(b"a", 1, 10)]
    assert Counter(one.group for one in choose(candidates, 110, equal_sizes=True)) == {0: 5, 1: 1, 2: 5}


def test_each_group_has_its_smallest_keys() -> None:
    """A slow twin: sort all keys of a group."""
    candidates = make_candidates(200, 4, seed=5)
    chosen = choose(candidates, 400, equal_sizes=True)
    for group in range(4):
        keys = sorted(one.key for one in candidates if one.group == group)
        assert [one.key for one in chosen if one.group == group] == keys[:10]
    assert [one.key for one in chosen] == sorted(one.key for one in chosen)


def test_a_group_of_which_some_were_dropped_is_remembered() -> None:
    """Otherwise a group of few but large examples would seem to need little, and the others would grow."""
    first = [Candidate(bytes([row]), 0, 30) for row in range(4)]
    second = [Candidate(bytes([100 + row]), 1, 1) for row in range(90)]
    assert choose_in_parts([first, second], 100)[0] == choose([*first, *second], 100)
    assert Counter(one.group for one in choose([*first, *second], 100)) == {0: 1, 1: 50}


def test_keys_are_uniform_numbers() -> None:
    leading = np.array([hash_example(1, 1, str(row).encode())[0] for row in range(5000)])
    assert stats.chisquare(np.bincount(leading, minlength=256)).pvalue > 0.001
