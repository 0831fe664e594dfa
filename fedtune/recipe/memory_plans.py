"""What ``techniques: auto`` was planned as: the settings that devices of a run may train with, and their memory.

The plans of a run are chosen before it begins and stored in its recipe, so a resumed run trains as it began. All of
them train the same tensors. A device takes the best one that fits its own budget.
"""

from typing import Annotated

from pydantic import Field

from fedtune.recipe.settings_model import SettingsModel
from fedtune.recipe.train_settings import Unit

__all__ = ["LARGEST_CORRECTION", "MemoryPlans", "PlanOption"]

LARGEST_CORRECTION = 2.0
"""The largest factor that earlier contributions may teach. Devices report what they held, and could report anything."""
_Bytes = Annotated[int, Field(ge=0, le=1 << 50)]


class PlanOption(SettingsModel):
    """Techniques with a size of micro-batches, and what they cost.

    ``anonymous_bytes`` and ``total_bytes`` are predicted peaks; ``needed_bytes`` is what a budget must allow.
    ``relative_time`` is 1 for the fewest operations.
    """

    techniques: list[Unit] = Field(min_length=1)
    micro_batch: int = Field(ge=1)
    anonymous_bytes: _Bytes
    total_bytes: _Bytes
    needed_bytes: _Bytes
    relative_time: float = Field(gt=0)
    exact_gradients: bool = True

    def correct_bytes(self, factor: float) -> int:
        """Return the bytes that a budget must allow if a process holds ``factor`` times the predicted memory."""
        return round(self.anonymous_bytes * factor) + self.needed_bytes - self.anonymous_bytes


class MemoryPlans(SettingsModel):
    """The plans of a run, written by fedtune for ``techniques: auto``.

    ``corrections`` are factors by device class, by which its devices held more than predicted in earlier runs.
    """

    options: list[PlanOption] = Field(min_length=1, description="settings that train the same tensors")
    corrections: dict[str, Annotated[float, Field(ge=1, le=LARGEST_CORRECTION)]] = Field(
        {}, description="factor on predicted memory, by device class"
    )

    def get_correction(self, device_class: str) -> float:
        """Return the factor of a device class, 1 if nothing was learned."""
        return self.corrections.get(device_class, 1.0)
