"""The main metric of a run, and which metrics are better when lower. This module imports no other of fedtune."""

from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["LOWER_IS_BETTER", "choose_main_metric"]

LOWER_IS_BETTER = frozenset({"loss", "mse", "perplexity", "drift-centred", "drift-plain", "drift-nac", "drift-scale"})
"""Metrics that are better when lower. All others are better when higher."""
_USUAL = ("accuracy", "perplexity", "loss")


def choose_main_metric(recipe: Mapping[str, Any] | None, measured: Collection[str]) -> str | None:
    """Return ``evaluation.main_metric`` if it was measured, else the first measured of accuracy, perplexity and loss.

    ``recipe`` is a recipe as JSON. Runs of earlier versions name no metric. Returns None when none of these was
    measured.
    """
    named = ((recipe or {}).get("evaluation") or {}).get("main_metric")
    return next((name for name in (named, *_USUAL) if name is not None and name in measured), None)
