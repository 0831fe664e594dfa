"""Chooses the examples that a device keeps for replay: a sample by hash, without any random state.

The key of an example is a hash of the seed, the client and the example itself. A buffer holds the examples with the
smallest keys, as bottom-k sampling does. This is a uniform sample without replacement, like that of a reservoir, but
it does not depend on the order in which the examples came, and meeting an example twice changes nothing. Equal
examples count once.

A budget in bytes is shared by groups, e.g. the classes: a group that needs less than its part leaves the rest to the
others. When a group arrives, the others keep those of their examples that have the smallest keys, so nothing is needed
that was dropped before. For this, a buffer remembers the smallest key that was dropped from each group: no example with
that key or a larger one enters again, even a small one that would fit.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

__all__ = ["Candidate", "Choice", "choose_examples", "hash_example"]


class Candidate(NamedTuple):
    """An example that may be kept: its key, its group and the bytes that it takes."""

    key: bytes
    group: int
    size: int


class Choice(NamedTuple):
    """The places of the chosen candidates in the order of their keys.

    ``limits`` are, for each group of which some were ever dropped, the smallest key among them.
    """

    places: list[int]
    limits: dict[int, bytes]


def hash_example(seed: int, client: int, content: bytes) -> bytes:
    """Return the key of an example, whose stored form includes its label.

    Clients have different keys, so that they do not all keep the same one of the examples that they share.
    """
    identity = hashlib.sha256(content).digest()
    return hashlib.sha256(f"{seed}/{client}/".encode() + identity).digest()


def choose_examples(
    candidates: Sequence[Candidate], limits: Mapping[int, bytes], budget: int, *, equal_sizes: bool = False
) -> Choice:
    """Choose the examples with the smallest keys of each group, at most ``budget`` bytes in all.

    ``limits`` are those of the last choice. The first of several equal examples counts, with the lowest of their
    groups. With ``equal_sizes``, where all examples of a run take equally many bytes, what remains goes to the lowest
    groups.
    """
    groups = _sort_into_groups(candidates, limits)
    totals = [_sum_sizes(places, candidates) for group, places in groups.items() if group not in limits]
    level = _find_level(totals, len(groups), budget)
    counts = {group: _count_fitting(places, candidates, level) for group, places in groups.items()}
    if equal_sizes:
        _add_remainder(counts, groups, candidates, budget)
    places = [place for group, all_places in groups.items() for place in all_places[: counts[group]]]
    dropped = {
        group: candidates[all_places[counts[group]]].key
        for group, all_places in groups.items()
        if counts[group] < len(all_places)
    }
    return Choice(sorted(places, key=lambda place: candidates[place].key), {**limits, **dropped})


def _sort_into_groups(candidates: Sequence[Candidate], limits: Mapping[int, bytes]) -> dict[int, list[int]]:
    """Return the places of distinct candidates below the limits, in the order of their keys, by group in ascending
    order.

    A group without a candidate below its limit stays, because it takes its part of the budget.
    """
    lowest: dict[bytes, int] = {}
    first: dict[bytes, int] = {}
    for place, one in enumerate(candidates):
        lowest[one.key] = min(one.group, lowest.get(one.key, one.group))
        first.setdefault(one.key, place)
    groups: defaultdict[int, list[int]] = defaultdict(list, {group: [] for group in limits})
    for key in sorted(first):
        group = lowest[key]
        if group not in limits or key < limits[group]:
            groups[group].append(first[key])
    return dict(sorted(groups.items()))


def _sum_sizes(places: Sequence[int], candidates: Sequence[Candidate]) -> int:
    return sum(candidates[place].size for place in places)


def _find_level(totals: Sequence[int], groups: int, budget: int) -> int:
    """Return the most bytes that a group may take, so that all groups together fit in the budget.

    ``totals`` are the bytes of the groups of which nothing was dropped. The others need all that they can get.
    """
    left = budget
    for total in sorted(totals):
        if total * groups > left:
            break
        left -= total
        groups -= 1
    return left // groups if groups else budget


def _count_fitting(places: Sequence[int], candidates: Sequence[Candidate], level: int) -> int:
    """Return how many examples of a group fit, smallest keys first. None after the first that does not fit counts."""
    return sum(taken <= level for taken in accumulate(candidates[place].size for place in places))


def _add_remainder(
    counts: dict[int, int], groups: Mapping[int, Sequence[int]], candidates: Sequence[Candidate], budget: int
) -> None:
    """Give one more example to the lowest groups that have one, as long as it fits."""
    taken = sum(_sum_sizes(places[: counts[group]], candidates) for group, places in groups.items())
    for group, places in groups.items():
        if counts[group] < len(places) and taken + (size := candidates[places[counts[group]]].size) <= budget:
            counts[group] += 1
            taken += size
