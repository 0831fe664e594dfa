"""The settings of a recipe for the checkpoints that are kept on disk."""

from typing import Literal

from pydantic import Field

from fedtune.recipe.settings_model import SettingsModel

__all__ = ["Checkpoints", "Keep"]


class Keep(SettingsModel):
    """The rounds whose checkpoints are kept. That of round 0 is always kept."""

    last: int = Field(2, ge=1, description="the newest so many")
    best: bool = Field(True, description="the one that scored best on validation, or on what clients hold out")
    every: int | None = Field(10, ge=1, description="each round of which this is a divisor; null: none for that")


class Checkpoints(SettingsModel):
    """What happens to checkpoints after their round is committed."""

    keep: Literal["all"] | Keep = Keep()
