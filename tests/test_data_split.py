from collections import Counter

import numpy as np
import pytest
from datasets import Dataset

from fedtune import data
from fedtune.data.loaded import as_table
from fedtune.errors import DataError
from tests.data_examples import a_recipe, labelled

KINDS = [
    "{kind: iid}",
    "{kind: dirichlet, alpha: 3}",
    "{kind: equal-dirichlet, alpha: 0.3}",
    "{kind: natural, by: domain}",
    "{kind: size, exponent: 1.0}",
    "{kind: shards, per_client: 2}",
]


def split(train: data.Table, kind: str, *overrides: str, clients: int = 4) -> list[np.ndarray]:
    return data.partition_examples(a_recipe(f"data.partition={kind}", *overrides, clients=clients), train)


def column(train: data.Table, name: str, clients: list[np.ndarray]) -> list[list[object]]:
    values = train[name][:]
    return [[values[row] for row in rows] for rows in clients]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clients", [1, 4, 7])
def test_every_split_is_a_sorted_partition_that_cuts_no_group(kind: str, clients: int) -> None:
    train = labelled(300, classes=3, group_size=4)
    owned = split(train, kind, clients=clients)
    assert len(owned) == clients
    assert sorted(np.concatenate(owned)) == list(range(300))
    assert all((np.diff(rows) > 0).all() for rows in owned)
    groups = [set(values) for values in column(train, "group", owned)]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 75


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_depends_on_the_seed_alone(kind: str) -> None:
    train = labelled(120)
    first, again = split(train, kind, "seed=1"), split(train, kind, "seed=1")
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    assert any(not np.array_equal(one, other) for one, other in zip(first, split(train, kind, "seed=2"), strict=True))


def test_iid_gives_even_shares_of_examples_and_labels() -> None:
    train = labelled(4000, classes=4)
    owned = split(train, "{kind: iid}")
    assert {len(rows) for rows in owned} == {1000}
    for labels in column(train, "label", owned):
        assert all(abs(count - 250) < 5 * 250**0.5 for count in Counter(labels).values())


def test_iid_evens_out_groups_of_different_sizes() -> None:
    train = as_table(Dataset.from_dict({"text": ["x"] * 500, "group": [str(int(row**0.5)) for row in range(500)]}))
    sizes = [len(rows) for rows in split(train, "{kind: iid}")]
    assert max(sizes) - min(sizes) <= 2 * 22 + 1  # the largest group has 2 * 22 - 1 examples


def test_a_smaller_alpha_skews_labels_more_and_sizes_stay_even() -> None:
    train = labelled(2000, classes=5)

    def largest_share(alpha: float) -> float:
        owned = split(train, f"{{kind: equal-dirichlet, alpha: {alpha}}}", clients=10)
        assert {len(rows) for rows in owned} == {200}
        return float(np.mean([max(Counter(labels).values()) / 200 for labels in column(train, "label", owned)]))

    assert largest_share(1000) < 0.3
    assert largest_share(1000) < largest_share(1) < largest_share(0.05)
    assert largest_share(0.05) > 0.6


def test_equal_dirichlet_refuses_clients_below_its_least_size() -> None:
    with pytest.raises(DataError, match="client 0 of 4 has fewer than 6 examples under the split 'equal-dirichlet'"):
        split(labelled(20), "{kind: equal-dirichlet, min_examples: 6}")


def test_a_natural_split_gives_each_value_its_own_clients() -> None:
    train = labelled(240)
    owned = split(train, "{kind: natural, by: domain}", clients=6)
    domains = [Counter(values) for values in column(train, "domain", owned)]
    assert [len(counts) for counts in domains] == [1] * 6
    assert Counter(next(iter(counts)) for counts in domains) == {"a": 2, "b": 2, "c": 2}
    assert {len(rows) for rows in owned} == {40}


def test_a_natural_split_keeps_values_whole_where_clients_are_fewer() -> None:
    train = as_table(Dataset.from_dict({"text": list("abcdefghij"), "author": list("aaaabbbccd")}))
    owned = split(train, "{kind: natural, by: author}", clients=2)
    assert column(train, "author", owned) == [list("aaaacc"), list("bbbd")]


def test_a_natural_split_may_go_by_the_column_named_as_group() -> None:
    train = labelled(40, group_size=10)
    owned = split(train, "{kind: natural, by: author}", "data.columns.group=author")
    assert {len(set(values)) for values in column(train, "group", owned)} == {1}


def test_sizes_follow_the_rank_and_the_label_mix_stays() -> None:
    train = labelled(2500, classes=2)
    owned = split(train, "{kind: size, exponent: 1.0}")
    assert [len(rows) for rows in owned] == [1200, 600, 400, 300]
    for labels in column(train, "label", owned):
        assert labels.count(0) == pytest.approx(len(labels) / 2, abs=1)


def test_what_rounding_owes_a_client_carries_over_labels() -> None:
    owned = split(labelled(30, classes=10), "{kind: size, exponent: 0}", clients=5)
    assert [len(rows) for rows in owned] == [6] * 5


def test_shards_leave_each_client_few_labels() -> None:
    train = labelled(1000, classes=10)
    owned = split(train, "{kind: shards, per_client: 2}", clients=5)
    assert {len(rows) for rows in owned} == {200}
    assert all(len(set(labels)) == 2 for labels in column(train, "label", owned))


@pytest.mark.parametrize("kind", ["dirichlet", "equal-dirichlet", "shards"])
def test_a_split_by_labels_needs_labels(kind: str) -> None:
    with pytest.raises(DataError, match=r"goes by labels.*use iid, size or natural"):
        split(as_table(Dataset.from_dict({"text": list("abcdefgh")})), f"{{kind: {kind}}}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_without_example_is_refused(kind: str) -> None:
    told = r"(client \d of 9 has no example|left a client with at most 0 examples).*use fewer devices"
    with pytest.raises(DataError, match=told):
        split(labelled(8), kind, clients=9)


def test_the_majority_label_stands_for_a_group() -> None:
    train = as_table(Dataset.from_dict({"text": ["x"] * 6, "label": [0, 1, 1, 1, 0, 0], "group": list("aaabbb")}))
    owned = split(train, "{kind: shards, per_client: 1}", clients=2)
    assert sorted(column(train, "group", owned)) == [list("aaa"), list("bbb")]
