"""What a run has told of any one client so far: epsilon at the recipe's delta, by Flower's accountant.

Clients are drawn by the recipe's seed, which every device knows: a known sample hides nobody, so none of the gain that
secret sampling has (Poisson, or a fixed number without replacement) may be claimed. Each client is charged a whole
Gaussian release for every round it was asked in; a run is charged what its most often asked client is.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.util import find_spec

from flwr.serverapp import GaussianPrivacyEvent, NeighboringRelation, PrivacyConfig, SamplingMethod

from fedtune.errors import RecipeError
from fedtune.recipe.schema import PrivacySettings, Recipe
from fedtune.tracking import ClientRecord, MetricRecord, RoundRecord

__all__ = ["RoundOutcome", "Spending", "compute_epsilon", "require_privacy_accountant", "select_charged_clients"]


RoundOutcome = tuple[str, Sequence[ClientRecord]]
"""A round's status, completed or failed, and what became of those it asked."""


def require_privacy_accountant(recipe: Recipe) -> None:
    """RecipeError when a recipe asks for privacy and what the accountant is made of is not installed."""
    if recipe.privacy is not None and find_spec("dp_accounting") is None:
        raise RecipeError("privacy: its accountant is not installed; pip install 'fedtune[privacy]', or drop privacy")


class Spending:
    """What a run has told of its clients, round after round; ``done`` are the rounds it has committed."""

    def __init__(self, recipe: Recipe, done: Iterable[RoundRecord]) -> None:
        self._recipe = recipe
        self._charged: Counter[int] = Counter()
        for record in done:
            self._charge((record.status, record.client_records))

    def compute_epsilon_after_round(self, asked: RoundOutcome) -> tuple[MetricRecord, ...]:
        """Epsilon with one more round, which is about to be committed; nothing without privacy."""
        if self._recipe.privacy is None:
            return ()
        self._charge(asked)
        value = compute_epsilon(self._recipe, max(self._charged.values(), default=0))
        return (MetricRecord(split="privacy", domain="all", name="epsilon", value=value),)

    def _charge(self, asked: RoundOutcome) -> None:
        if self._recipe.privacy is not None:
            self._charged.update(select_charged_clients(self._recipe.privacy, asked))


def select_charged_clients(privacy: PrivacySettings, asked: RoundOutcome) -> Counter[int]:
    """The clients that one round charges with a release.

    With the server's noise a round releases its new weights, and a failed one nothing. With the clients' own, what was
    sent is out, whatever became of the round, and of clients that fell silent it must be assumed; only those that
    declined before they trained are not charged.
    """
    status, contributions = asked
    return Counter(one.client for one in contributions if _out(privacy, status, one))


def _out(privacy: PrivacySettings, status: str, sent: ClientRecord) -> bool:
    return status == "completed" if privacy.noise_added_by == "server" else sent.status != "declined"


def compute_epsilon(recipe: Recipe, count: int) -> float:
    """Epsilon at the recipe's delta of so many releases.

    With the server's noise for a client's contribution in place of zero, which changes a sum by ``clip`` at most; who
    took part counts as known, so that the number of summands does not tell anything new.
    With a client's own noise for any two data sets it may hold: one contribution in place of another changes what is
    sent by 2 clip, so that the noise counts as half of its multiplier.
    """
    from flwr.serverapp import RdpAccountant

    assert recipe.privacy is not None
    if not count:
        return 0.0
    relation, sampling = NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.NO_AMPLIFICATION
    accountant = RdpAccountant(PrivacyConfig(recipe.privacy.target_delta, recipe.num_clients, relation, sampling))
    multiplier = recipe.privacy.noise_multiplier / (1 if recipe.privacy.noise_added_by == "server" else 2)
    accountant.compose(GaussianPrivacyEvent(multiplier, recipe.cohort_size, recipe.num_clients), count)
    return accountant.get_epsilon(recipe.privacy.target_delta)
