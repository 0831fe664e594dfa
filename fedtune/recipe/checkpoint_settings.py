"""The settings of a recipe for the checkpoints that are kept on disk."""

from typing import Literal

from pydantic import Field

from fedtune.recipe.settings_model import SettingsModel

__all__ = ["Checkpoints", "Keep"]


class Keep(SettingsModel):
    """The rounds whose checkpoints are kept. That of round 0 is always kept."""

    last: int = Field(2, ge=1, description="number of newest rounds to keep")
    best: bool = Field(
        True, description="keep the round with the best metric on validation data, or on clients' held-out data"
    )
    every: int | None = Field(10, ge=1, description="keep rounds divisible by this number; null: none")


class Checkpoints(SettingsModel):
    """What happens to checkpoints after their round is committed."""

    keep: Literal["all"] | Keep = Keep()
