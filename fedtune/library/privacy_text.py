"""The privacy guarantee of a run in words, for the terminal and for the cards of exports."""

from collections.abc import Sequence

from fedtune.tracking import RoundRecord, RunRecord
from fedtune.tracking.run_summary import get_privacy_spent

__all__ = ["describe_privacy", "make_privacy_paragraph"]

_NEIGHBOURS = {
    "server": "for the run with one client's updates and with zeros in their place; the server sees them in clear",
    "clients": "for any two data sets a client may hold; the client adds the noise before it sends anything",
}


def describe_privacy(run: RunRecord, rounds: Sequence[RoundRecord]) -> str:
    """Return epsilon, delta and who added the noise; empty for a run without privacy."""
    found = get_privacy_spent(run, rounds)
    if found is None:
        return ""
    value = "none spent" if found["epsilon"] is None else f"epsilon {found['epsilon']:.4g}"
    return f"{value} at delta {found['delta']:g}, noise by the {found['noise_added_by']}"


def make_privacy_paragraph(run: RunRecord, rounds: Sequence[RoundRecord]) -> str:
    """Return a paragraph for a model card; empty for a run without privacy."""
    found = get_privacy_spent(run, rounds)
    if found is None:
        return ""
    return (
        f"\nDifferential privacy of its weights: {describe_privacy(run, rounds)}. "
        f"It holds {_NEIGHBOURS[found['noise_added_by']]}. "
        "The noise is drawn from a secret key. The guarantee holds against everyone who does not have this key. It "
        "does not cover which clients took part, or the losses and example counts in the run store.\n"
    )
