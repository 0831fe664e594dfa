"""Metrics of generated answers against wanted ones, as SQuAD computes them: exact match and F1 over words.

Case, punctuation, articles and white space do not count. torchmetrics computes them, and is imported only when needed.
"""

from collections.abc import Sequence

from fedtune.errors import RecipeError

__all__ = ["ANSWER_METRICS", "compare_answers"]

ANSWER_METRICS = ("exact_match", "f1")


def compare_answers(names: Sequence[str], pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Return the named metrics, 0 to 1, as means over pairs of a generated and a wanted answer."""
    try:
        from torchmetrics.functional.text import squad
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"evaluation.metrics: {names[0]} needs {error.name}, which is not installed; pip install torchmetrics",
            code="metric-unavailable",
        ) from error

    written = [{"prediction_text": text, "id": str(row)} for row, (text, _) in enumerate(pairs)]
    wanted = [
        {"answers": {"answer_start": [0], "text": [answer]}, "id": str(row)} for row, (_, answer) in enumerate(pairs)
    ]
    found = squad(written, wanted)
    return {name: float(found[name]) / 100 for name in names}
