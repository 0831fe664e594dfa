"""Epsilon: Flower's accountant beside the Gaussian mechanism in closed form, and what is charged to whom."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from fedtune.errors import RecipeError
from fedtune.recipe.schema import PrivacySettings
from fedtune.server import privacy_accounting
from fedtune.server.privacy_accounting import (
    RoundOutcome,
    Spending,
    compute_epsilon,
    require_privacy_accountant,
    select_charged_clients,
)
from fedtune.tracking import ClientRecord, RoundRecord, Store
from tests.federations import execute, trivial
from tests.private_federations import private
from tests.store_examples import a_client_record, a_round

DELTA = 1e-5


def by_orders(noise: float, count: int) -> float:
    """The least epsilon over Renyi orders: count * alpha / (2 noise^2), converted to an epsilon at DELTA.

    The conversion is Proposition 12 of Canonne, Kamath and Steinke (arXiv 2004.00010).
    """
    orders = [1.01 + step / 1000 for step in range(120_000)]
    return min(count * a / (2 * noise**2) + math.log1p(-1 / a) - math.log(DELTA * a) / (a - 1) for a in orders)


def exact(noise: float, count: int) -> float:
    """The true epsilon: count releases are one of noise / sqrt(count) (Balle and Wang, arXiv 1805.06530, Theorem 8)."""
    sigma = noise / math.sqrt(count)

    def excess(value: float) -> float:
        one, other = 1 / (2 * sigma) - value * sigma, -1 / (2 * sigma) - value * sigma
        return float(norm.cdf(one) - math.exp(value) * norm.cdf(other)) - DELTA

    return float(brentq(excess, 0, 500))


@pytest.mark.parametrize(("noise", "count"), [(0.8, 1), (1.0, 16), (2.0, 10), (4.0, 10), (8.0, 200)])
def test_the_accountant_agrees_with_the_closed_form_and_is_no_less_than_the_truth(noise: float, count: int) -> None:
    found = compute_epsilon(trivial("privacy.clipping_norm=1", f"privacy.noise_multiplier={noise}"), count)
    least = by_orders(noise, count)
    assert least * (1 - 1e-6) <= found <= least * 1.01, "a coarse grid of orders may cost a percent"
    assert exact(noise, count) < found < exact(noise, count) * 1.35


def test_clients_that_add_noise_are_charged_for_any_other_data_set() -> None:
    own = trivial("privacy.clipping_norm=1", "privacy.noise_multiplier=4", "privacy.noise_added_by=client")
    assert compute_epsilon(own, 3) == compute_epsilon(
        trivial("privacy.clipping_norm=1", "privacy.noise_multiplier=2"), 3
    )
    assert compute_epsilon(own, 0) == 0


def asked(*statuses: str, first: int = 0) -> list[ClientRecord]:
    return [replace(a_client_record(0), client=first + place, status=status) for place, status in enumerate(statuses)]


def releases(privacy: PrivacySettings, rounds: Sequence[RoundOutcome]) -> int:
    return max(sum((select_charged_clients(privacy, one) for one in rounds), Counter()).values(), default=0)


ROUNDS: list[RoundOutcome] = [
    ("completed", []),
    ("completed", asked("merged", "merged")),
    ("failed", asked("unused", "missing")),
    ("completed", asked("merged", "declined")),
    ("completed", asked("merged", "rejected", first=1)),
]


def test_with_the_servers_noise_a_failed_round_costs_nothing_and_clients_are_charged_for_their_own_rounds() -> None:
    assert releases(PrivacySettings(clipping_norm=1, noise_multiplier=1), ROUNDS) == 3, (
        "client 1 was asked in three rounds that completed"
    )
    assert releases(PrivacySettings(clipping_norm=1, noise_multiplier=1), ROUNDS[:3]) == 1
    assert releases(PrivacySettings(clipping_norm=1, noise_multiplier=1), []) == 0


def test_with_the_clients_noise_what_was_sent_counts_even_if_the_round_failed() -> None:
    own = PrivacySettings(clipping_norm=1, noise_multiplier=1, noise_added_by="clients")
    assert releases(own, ROUNDS) == 3, "client 0 sent in rounds 1, 2 and 3; client 1 declined once"
    assert releases(own, ROUNDS[:3]) == 2
    assert releases(own, [("completed", asked("declined"))]) == 0


def test_without_the_accountant_the_mend_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy_accounting, "find_spec", lambda name: None)
    require_privacy_accountant(trivial())
    with pytest.raises(RecipeError, match=r"^privacy: .* pip install 'fedtune\[privacy\]', or remove privacy$"):
        require_privacy_accountant(trivial("privacy.clipping_norm=1", "privacy.noise_multiplier=1"))


@pytest.mark.parametrize("where", ["server", "client"])
def test_epsilon_after_each_round_is_that_of_all_rounds_so_far(where: str) -> None:
    recipe = trivial("privacy.clipping_norm=1", "privacy.noise_multiplier=2", f"privacy.noise_added_by={where}")
    assert recipe.privacy is not None
    spending = Spending(recipe, [])
    for number in range(len(ROUNDS)):
        [told] = spending.compute_epsilon_after_round(ROUNDS[number])
        assert told.value == compute_epsilon(recipe, releases(recipe.privacy, ROUNDS[: number + 1]))
    done = [a_round(number, status=status, client_records=tuple(sent)) for number, (status, sent) in enumerate(ROUNDS)]
    [resumed] = Spending(recipe, done[:3]).compute_epsilon_after_round(ROUNDS[3])
    assert resumed.value == compute_epsilon(recipe, releases(recipe.privacy, ROUNDS[:4]))
    assert Spending(trivial(), done).compute_epsilon_after_round(ROUNDS[3]) == ()


def test_a_run_reads_its_earlier_rounds_no_oftener_the_more_it_has(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    rounds = Store.rounds

    def counted(store: Store, run_id: str, after: int = -1) -> list[RoundRecord]:
        read.append(run_id)
        return rounds(store, run_id, after)

    monkeypatch.setattr(Store, "rounds", counted)
    for count in (2, 6):
        execute(private("server", f"federation.rounds={count}", "train.local_steps=1"), run=f"run-{count}")
    assert read.count("run-2") == read.count("run-6")
