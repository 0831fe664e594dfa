"""The rounds of a recipe with a stream: its tasks say how many there are, so that ``federation`` need not."""

from typing import Any

from pydantic import ValidationError

from fedtune.recipe.stream_settings import Stream

__all__ = ["fill_in_rounds"]


def fill_in_rounds(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a recipe with the rounds of its stream, as far as they are known before the data.

    An invalid stream is left to the recipe's own validation. ValueError if rounds are given although the data decide
    how many tasks there are.
    """
    federation = recipe.get("federation") or {}
    if not isinstance(federation, dict):
        return recipe
    try:
        stream = Stream.model_validate(recipe["stream"])
    except ValidationError:
        return {**recipe, "federation": {"rounds": 1, **federation}}
    planned = stream.num_rounds
    if planned is None and "rounds" in federation:
        raise ValueError("federation.rounds: the data decide how many tasks the stream has, and so the rounds; drop it")
    return {**recipe, "federation": {"rounds": planned or 1, **federation}}
