"""A device's thin install: what fedtune requires, without what only servers, pictures and re-basin use.

pip knows no extra that takes away, and Flower itself requires a web server and a database; so a thin install is a list
of exact versions that pip is told not to add to (``--no-deps``).
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
        "matplotlib",
        "nltk",
        "prompt-toolkit",
        "rouge-score",
        "scikit-learn",
        "scipy",
        "seqeval",
        "sqlalchemy",
        "starlette",
        "uv",
        "uvicorn",
    }
)
"""Distributions, by normalised name; what only they require stays away with them."""


def list_requirements() -> list[str]:
    """``name==version`` of everything a device needs, as installed here, in order; fedtune itself is among them."""
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
    """The distributions, with their extras, that one with these extras requires on this machine."""
    from packaging.requirements import Requirement

    parsed = [Requirement(text) for text in distribution(name).requires or []]
    return [(one.name, frozenset(one.extras)) for one in parsed if _holds(one.marker, extras)]


def _holds(marker: "Marker | None", extras: frozenset[str]) -> bool:
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in (*extras, ""))


def explain_missing_module(module: str) -> str | None:
    """The sentence for a module that a thin install leaves out; None for any other."""
    if module.partition(".")[0].replace("_", "-").lower() not in EXCLUDED_PACKAGES:
        return None
    return f"{module} is not installed, since this is a device's thin install; for this command: pip install fedtune"
