"""The privacy loss of a run so far: epsilon at the recipe's delta, computed by Flower's accountant.

Clients are sampled with the recipe's seed, which every device knows. The sampling is therefore not secret, and there is
no amplification by subsampling (Poisson, or a fixed number without replacement). Each client is charged a full Gaussian
release for every round in which it was selected. The run's epsilon is that of the client selected most often.
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
"""The status of a round, completed or failed, and the records of its clients."""


def require_privacy_accountant(recipe: Recipe) -> None:
    """Raise RecipeError if the recipe has privacy and the accountant's package is not installed."""
    if recipe.privacy is not None and find_spec("dp_accounting") is None:
        raise RecipeError("privacy: its accountant is not installed; pip install 'fedtune[privacy]', or remove privacy")


class Spending:
    """The privacy loss of a run, round by round. ``done`` are its committed rounds."""

    def __init__(self, recipe: Recipe, done: Iterable[RoundRecord]) -> None:
        self._recipe = recipe
        self._charged: Counter[int] = Counter()
        for record in done:
            self._charge((record.status, record.client_records))

    def compute_epsilon_after_round(self, asked: RoundOutcome) -> tuple[MetricRecord, ...]:
        """Return epsilon including a round that is about to be committed; empty without privacy."""
        if self._recipe.privacy is None:
            return ()
        self._charge(asked)
        value = compute_epsilon(self._recipe, max(self._charged.values(), default=0))
        return (MetricRecord(split="privacy", domain="all", name="epsilon", value=value),)

    def _charge(self, asked: RoundOutcome) -> None:
        if self._recipe.privacy is not None:
            self._charged.update(select_charged_clients(self._recipe.privacy, asked))


def select_charged_clients(privacy: PrivacySettings, asked: RoundOutcome) -> Counter[int]:
    """Return the clients that are charged with a release in one round.

    If the server adds the noise, a completed round releases its new weights, and a failed round releases nothing. If
    clients add it, an update is released when it is sent, even if the round fails. Clients without a reply may have
    sent one, so only clients that declined before training are not charged.
    """
    status, contributions = asked
    return Counter(one.client for one in contributions if _out(privacy, status, one))


def _out(privacy: PrivacySettings, status: str, sent: ClientRecord) -> bool:
    return status == "completed" if privacy.noise_added_by == "server" else sent.status != "declined"


def compute_epsilon(recipe: Recipe, count: int) -> float:
    """Return epsilon at the recipe's delta after ``count`` releases.

    If the server adds the noise, neighbouring inputs differ by one client update or zeros in its place, which changes
    the sum by at most the clipping norm. The set of clients counts as known, so the number of summands reveals nothing.
    If clients add it, neighbouring inputs are any two data sets of a client. Two updates differ by at most twice the
    clipping norm, so the noise multiplier counts half.
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
