"""The cases to measure: a recipe with one list of techniques, and the inputs of the step."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fedtune import techniques
from fedtune.errors import RecipeError
from fedtune.recipe.schema import Recipe, Unit
from fedtune.recipe.unit_registry import list_unit_names

__all__ = ["BASELINES", "ProfileCase", "format_techniques", "list_profiled_techniques", "make_profile_cases"]

BASELINES = ("full", "lora", "lora+gradient-checkpointing", "qlora")
"""The techniques that are always measured for comparison."""


@dataclass(frozen=True)
class ProfileCase:
    """A recipe as JSON with the techniques to measure, and the class names of its model.

    ``batch`` is a packed batch; None draws a random one. ``check_gradients`` compares gradients with those of stored
    activations.
    """

    technique: str
    recipe: str = field(repr=False)
    labels: tuple[str, ...]
    batch: bytes | None = field(repr=False)
    check_gradients: bool = False


def make_profile_cases(
    recipe: Recipe, asked: Sequence[Sequence[Unit]], labels: Sequence[str], batch: bytes | None, check: bool = False
) -> list[ProfileCase]:
    """Return the baselines, then the requested techniques, each once; RecipeError for an invalid combination."""
    found: list[tuple[techniques.Technique, ...]] = []
    made = []
    yardsticks = [[Unit(name=name) for name in joined.split("+")] for joined in BASELINES]
    for units in [*yardsticks, *asked]:
        chosen = techniques.build_techniques(units)
        if chosen not in found:
            found.append(chosen)
            train = recipe.train.model_copy(update={"techniques": list(units)})
            text = recipe.model_copy(update={"train": train}).model_dump_json()
            made.append(ProfileCase(format_techniques(units), text, tuple(labels), batch, check))
    return made


def list_profiled_techniques() -> list[list[Unit]]:
    """Return every technique: alone if it trains something, otherwise with one that does."""
    return [found for name in list_unit_names("fedtune.techniques") if (found := _alone_or_beside(name))]


def _alone_or_beside(name: str) -> list[Unit]:
    for joined in (name, f"lora+{name}", f"full+{name}"):
        units = [Unit(name=one) for one in joined.split("+")]
        try:
            techniques.build_techniques(units)
        except RecipeError:
            continue
        return units
    return []


def format_techniques(units: Sequence[Unit]) -> str:
    """Format techniques as one word, with the settings that are given: ``lora(rank=4)+gradient-checkpointing``."""
    return "+".join(f"{unit.name}{_settings(unit)}" for unit in units)


def _settings(unit: Unit) -> str:
    return f"({', '.join(f'{key}={value}' for key, value in unit.settings.items())})" if unit.settings else ""
