"""The settings of a recipe for the codecs of messages."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from fedtune.recipe.settings_model import SettingsModel
from fedtune.recipe.train_settings import Unit, split_joined

__all__ = ["WireSettings"]


class WireSettings(SettingsModel):
    """Codecs of what clients send and of what they receive, in the order in which they are applied."""

    up: list[Unit] = Field([], description="codecs of client updates, e.g. [top-k, int8, zstd]")
    down: list[Unit] = Field([], description="codecs of the shared state, e.g. [bf16, zstd]")
    error_feedback: Literal["none", "ef21"] = Field(
        "none", description="ef21: devices send what the server lacks of their update, and lose nothing for good"
    )

    @field_validator("up", "down", mode="before")
    @classmethod
    def _split_joined_codecs(cls, value: Any) -> Any:
        return split_joined(value)

    @model_validator(mode="after")
    def _names_a_codec(self) -> Self:
        if not (self.up or self.down):
            raise ValueError("up and down name no codec; name one, e.g. up: [int8, zstd], or drop wire")
        return self
