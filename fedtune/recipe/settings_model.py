"""The base class of all settings."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from fedtune.interrupts import hold_interrupts

__all__ = ["SettingsModel"]


class SettingsModel(BaseModel):
    """Immutable settings that reject unknown keys.

    Ctrl-C waits while they are written: pydantic would turn it into an error of the serializer that it hits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def model_dump(self, **options: Any) -> dict[str, Any]:
        """Return the settings as a dictionary, with the options of pydantic."""
        with hold_interrupts():
            return super().model_dump(**options)

    def model_dump_json(self, **options: Any) -> str:
        """Return the settings as JSON, with the options of pydantic."""
        with hold_interrupts():
            return super().model_dump_json(**options)
