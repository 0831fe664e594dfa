"""The settings of a class of devices in a recipe."""

from typing import Any, Literal

from pydantic import ByteSize, Field, SerializerFunctionWrapHandler, field_validator, model_serializer

from fedtune.recipe.federation import Tag
from fedtune.recipe.settings_model import SettingsModel
from fedtune.recipe.train_settings import ComputeDevice, Unit, split_joined

__all__ = ["OVERRIDABLE", "DeviceClass", "Dtype"]

Dtype = Literal["float32", "bfloat16"]

OVERRIDABLE = ("techniques", "batch_size", "dtype", "device")
"""The settings of a recipe that a device class may override."""
_LEFT_OUT = (("device", None), ("storage", None), ("attack", None))
"""Recipes without these are written as before there were any, so that their runs resume."""


class DeviceClass(SettingsModel):
    """Devices of one kind: their number, their memory for a training step, and settings that replace those of all
    devices.

    Their techniques may train only tensors that ``train.techniques`` shares. Low-rank pairs may have a smaller rank.
    Clients with an ``attack`` are hostile. Real devices never are: a server and a device refuse such a recipe.
    """

    name: str = "device"
    count: int = Field(ge=1)
    memory: ByteSize = Field(ByteSize(1_000_000_000), gt=0, description="e.g. 512MB or 2GiB")
    techniques: list[Unit] | None = Field(None, min_length=1, description="replaces train.techniques")
    batch_size: int | None = Field(None, ge=1, description="replaces train.batch_size")
    dtype: Dtype | None = Field(None, description="replaces model.dtype")
    device: ComputeDevice | None = Field(None, description="replaces train.device")
    storage: ByteSize | None = Field(
        None, description="bytes on disk for what continual methods keep; replaces stream.own_memory.budget"
    )
    tags: list[Tag] = Field([], description="tags for federation.selection in a simulation")
    examples_per_second: float | None = Field(
        None, gt=0, description="examples per simulated second; without it, no deadline is missed"
    )
    spread: float = Field(0.25, ge=0, le=2, description="standard deviation of the logarithm of simulated durations")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability that a simulated client sends no reply in a round")
    attack: Unit | None = Field(None, description="what hostile clients do, in simulations only; e.g. sign-flip")

    @field_validator("techniques", mode="before")
    @classmethod
    def _split_joined_techniques(cls, value: Any) -> Any:
        return split_joined(value)

    @model_serializer(mode="wrap")
    def _leave_out_what_is_unset(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = serialise(self)
        return {key: value for key, value in written.items() if (key, value) not in _LEFT_OUT}

    @property
    def overridden_settings(self) -> tuple[str, ...]:
        """The names of the settings that this class overrides."""
        return tuple(name for name in OVERRIDABLE if getattr(self, name) is not None)
