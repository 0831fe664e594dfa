"""The settings of random changes to training images."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from fedtune.recipe.settings_model import SettingsModel

__all__ = ["Augmentation"]


class Augmentation(SettingsModel):
    """Random changes to the images of a training step, drawn anew for each. Images are never changed in evaluation."""

    horizontal_flip: bool = Field(False, description="mirror every other image, at random")
    random_resized_crop: float | None = Field(
        None,
        gt=0,
        le=1,
        description="smallest share of the area that a random crop keeps before it is resized to the input size",
    )
    colour_jitter: float = Field(
        0.0, ge=0, lt=1, description="brightness, contrast and saturation are each multiplied by 1 - x to 1 + x"
    )

    @model_validator(mode="before")
    @classmethod
    def _accept_color(cls, value: Any) -> Any:
        """Accept the spelling ``color_jitter``. Both spellings together are refused by validation."""
        if not isinstance(value, Mapping) or "colour_jitter" in value:
            return value
        return {"colour_jitter" if key == "color_jitter" else key: entry for key, entry in value.items()}

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if not (self.horizontal_flip or self.random_resized_crop or self.colour_jitter):
            raise ValueError(
                "nothing is set, so no image changes; set horizontal_flip, random_resized_crop or colour_jitter, or "
                "drop augmentation"
            )
        return self
