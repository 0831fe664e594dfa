"""Which metric of a run counts, and in which direction; nothing is imported to know it."""

from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["LOWER_IS_BETTER", "choose_main_metric"]

LOWER_IS_BETTER = frozenset({"loss", "mse", "perplexity"})
"""Metrics that fall as a model gets better. All others rise."""
_USUAL = ("accuracy", "perplexity", "loss")


def choose_main_metric(recipe: Mapping[str, Any] | None, measured: Collection[str]) -> str | None:
    """The metric that ``evaluation.main_metric`` names, if it was measured; else accuracy, perplexity or loss.

    ``recipe`` is a recipe as JSON has it. Runs of earlier versions name none. None when nothing usual was measured.
    """
    named = ((recipe or {}).get("evaluation") or {}).get("main_metric")
    return next((name for name in (named, *_USUAL) if name is not None and name in measured), None)
