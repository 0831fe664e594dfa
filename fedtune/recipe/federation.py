"""The settings of a recipe for the federation: which clients take part in a round, and which updates are merged."""

from typing import Annotated, Any, Literal, Self

from pydantic import ByteSize, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from fedtune.recipe.round_schedule import EarlyStopping, ScheduledSettings
from fedtune.recipe.settings_model import SettingsModel
from fedtune.recipe.train_settings import Unit

__all__ = ["Asynchronous", "ClientSelection", "Federation", "Tag"]

_LEFT_OUT = (("algorithm", None), ("schedule", None), ("early_stopping", None))
"""Recipes without these are written as before there were any, so that their runs resume."""
Tag = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,31}$")]


class ClientSelection(SettingsModel):
    """Selects devices that meet all criteria. In a simulation, the criteria apply to the device classes."""

    device_names: list[str] = Field([], description="patterns of device names, e.g. kitchen-*; a device must match one")
    tags: list[Tag] = Field([], description="tags that a device must have; operators assign them")
    min_memory: ByteSize = Field(ByteSize(0), description="minimum memory that a device must allow its trainer")
    sampling: Literal["random", "least-recent"] = Field("random", description="order in which clients are sampled")

    @property
    def has_criteria(self) -> bool:
        """Whether any device could be excluded."""
        return bool(self.device_names or self.tags or self.min_memory)


class Asynchronous(SettingsModel):
    """The asynchronous mode of FedBuff: a round ends after a number of updates, including those of earlier requests."""

    buffer_size: int = Field(ge=1, description="number of usable updates that end a round")
    staleness_exponent: float = Field(
        0.5, ge=0, description="an update that is tau rounds late is scaled by (1 + tau) ** -staleness_exponent"
    )
    max_staleness: int = Field(10, ge=0, description="updates that are later than this number of rounds are dropped")


class Federation(SettingsModel):
    """Which clients take part in a round, and which of their updates are merged."""

    rounds: int = Field(ge=1)
    fraction_train: float = Field(1.0, gt=0, le=1)
    clients_per_round: int | None = Field(
        None, ge=1, description="number of clients per round; replaces fraction_train"
    )
    quorum: int = Field(1, ge=1, description="number of usable updates that a round needs")
    deadline: float | None = Field(
        None, gt=0, description="seconds that a round waits for replies; simulated seconds in a simulation"
    )
    take_first: int | None = Field(
        None, ge=1, description="number of usable replies that end a round; sample more clients than this"
    )
    max_update_norm: float | None = Field(None, gt=0, description="updates with a larger L2 norm are rejected")
    norm_bound: float | None = Field(
        50.0, gt=1, description="updates larger than this multiple of the cohort's median are rejected; null: no bound"
    )
    selection: ClientSelection = ClientSelection()
    asynchronous: Asynchronous | None = Field(None, description="merge late updates too; default: they are dropped")
    algorithm: Unit | None = Field(
        None, description="corrects clients or weighs updates, e.g. fedprox or scaffold: {option: 1}; default: FedAvg"
    )
    schedule: list[ScheduledSettings] | None = Field(
        None,
        min_length=1,
        max_length=100,
        description="lr, local_steps or clients_per_round that change from a round on",
    )
    early_stopping: EarlyStopping | None = Field(
        None, description="end the run before its last round; default: all rounds are done"
    )

    @model_serializer(mode="wrap")
    def _leave_out_what_is_unset(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = serialise(self)
        return {key: value for key, value in written.items() if (key, value) not in _LEFT_OUT}

    @model_validator(mode="after")
    def _quorum_fits_buffer(self) -> Self:
        if self.asynchronous is not None and self.quorum > self.asynchronous.buffer_size:
            raise ValueError(
                f"quorum is {self.quorum}, but asynchronous.buffer_size ends a round with "
                f"{self.asynchronous.buffer_size} answers"
            )
        return self

    @model_validator(mode="after")
    def _take_first_fits(self) -> Self:
        if self.take_first is None:
            return self
        if self.asynchronous is not None:
            raise ValueError(
                "take_first and asynchronous exclude each other: asynchronous.buffer_size replies end a round"
            )
        if self.quorum > self.take_first:
            raise ValueError(f"quorum is {self.quorum}, but take_first ends a round with {self.take_first} replies")
        return self
