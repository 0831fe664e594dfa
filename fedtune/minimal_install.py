"""The minimal install for a device: the requirements of fedtune without those that only servers, images or re-basin
use.

pip has no extras that remove requirements, and Flower itself requires a web server and a database. So a minimal install
is a list of exact versions that is installed with ``--no-deps``.
"""

from importlib.metadata import distribution
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.markers import Marker

__all__ = ["EXCLUDED_PACKAGES", "explain_missing_module", "list_requirements"]

EXCLUDED_PACKAGES = frozenset(
    {
        "alembic",
        "fastapi",
        "lightning-utilities",
        "matplotlib",
        "nltk",
        "prompt-toolkit",
        "rouge-score",
        "scikit-learn",
        "scipy",
        "seqeval",
        "sqlalchemy",
        "starlette",
        "torchmetrics",
        "uv",
        "uvicorn",
    }
)
"""Excluded distributions, by normalised name. Requirements of these alone are excluded too."""


def list_requirements() -> list[str]:
    """Return ``name==version`` of every distribution that a device needs, as installed here, sorted; including
    fedtune.
    """
    from packaging.utils import canonicalize_name

    found: dict[str, str] = {}
    waiting = [("fedtune", frozenset[str]())]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        wanted = waiting.pop()
        if wanted in seen or canonicalize_name(wanted[0]) in EXCLUDED_PACKAGES:
            continue
        seen.add(wanted)
        found[canonicalize_name(wanted[0])] = distribution(wanted[0]).version
        waiting += _required(*wanted)
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def _required(name: str, extras: frozenset[str]) -> list[tuple[str, frozenset[str]]]:
    """Return the distributions, with their extras, that a distribution with these extras requires on this machine."""
    from packaging.requirements import Requirement

    parsed = [Requirement(text) for text in distribution(name).requires or []]
    return [(one.name, frozenset(one.extras)) for one in parsed if _holds(one.marker, extras)]


def _holds(marker: "Marker | None", extras: frozenset[str]) -> bool:
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in (*extras, ""))


def explain_missing_module(module: str) -> str | None:
    """Return the message for a module that a minimal install excludes; None for any other module."""
    if module.partition(".")[0].replace("_", "-").lower() not in EXCLUDED_PACKAGES:
        return None
    return f"{module} is not installed, since this is a device's thin install; for this command: pip install fedtune"
