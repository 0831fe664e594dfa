"""The settings of a recipe for the federation: which clients take part in a round, and which updates are merged."""

from typing import Annotated, Literal, Self

from pydantic import ByteSize, Field, model_validator

from fedtune.recipe.settings_model import SettingsModel

__all__ = ["Asynchronous", "ClientSelection", "Federation", "Tag"]

Tag = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,31}$")]


class ClientSelection(SettingsModel):
    """Selects devices that meet all criteria. In a simulation, the criteria apply to the device classes."""

    device_names: list[str] = Field([], description="patterns of names such as kitchen-*, one of which must fit")
    tags: list[Tag] = Field([], description="tags a device must have, all of them; operators give them")
    min_memory: ByteSize = Field(ByteSize(0), description="least memory a device allows its trainer")
    sampling: Literal["random", "least-recent"] = Field("random", description="whom to sample first")

    @property
    def has_criteria(self) -> bool:
        """Whether any device could be excluded."""
        return bool(self.device_names or self.tags or self.min_memory)


class Asynchronous(SettingsModel):
    """The asynchronous mode of FedBuff: a round ends after a number of updates, including those of earlier requests."""

    buffer_size: int = Field(ge=1, description="usable answers that make a round")
    staleness_exponent: float = Field(
        0.5, ge=0, description="tau rounds late, an answer is scaled by (1 + tau) ** -staleness_exponent"
    )
    max_staleness: int = Field(10, ge=0, description="an answer that would be later than so many rounds is given up")


class Federation(SettingsModel):
    """Which clients take part in a round, and which of their updates are merged."""

    rounds: int = Field(ge=1)
    fraction_train: float = Field(1.0, gt=0, le=1)
    clients_per_round: int | None = Field(None, ge=1, description="so many clients a round, in place of a fraction")
    quorum: int = Field(1, ge=1, description="usable contributions a round needs")
    deadline: float | None = Field(
        None, gt=0, description="seconds a round waits for replies; simulated seconds in a simulation"
    )
    take_first: int | None = Field(
        None, ge=1, description="a round ends with so many usable replies: ask more clients, take the first"
    )
    max_update_norm: float | None = Field(None, gt=0, description="a contribution of larger L2 norm is refused")
    norm_bound: float | None = Field(
        50.0, gt=1, description="an update so many times as large as the cohort's median is refused; null: none is"
    )
    selection: ClientSelection = ClientSelection()
    asynchronous: Asynchronous | None = Field(
        None, description="late answers are merged too; without it they are dropped"
    )

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
