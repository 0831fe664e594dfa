"""The settings of a recipe for local training: one client in one round, with its techniques."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from fedtune.recipe.augmentation_settings import Augmentation
from fedtune.recipe.settings_model import SettingsModel
from fedtune.recipe.versions import translate_unit

__all__ = ["ComputeDevice", "Optimiser", "Train", "Unit", "split_joined"]


class Unit(SettingsModel):
    """A technique or a merge step by name, with its settings: ``lora`` or ``lora: {rank: 8}``."""

    name: str
    settings: dict[str, Any] = Field({})

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        value = translate_unit(value)
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, Mapping) and len(value) == 1 and "name" not in value:
            [(name, settings)] = value.items()
            return {"name": name, "settings": settings or {}}
        return value

    @model_serializer
    def _to_yaml(self) -> dict[str, Any]:
        return {self.name: self.settings}


def split_joined(value: Any) -> Any:
    """Split names joined by ``+`` into a list. Other values are returned unchanged."""
    return value.split("+") if isinstance(value, str) else value


ComputeDevice = Literal["auto", "cpu", "cuda", "mps"]

Optimiser = Literal["adamw", "sgd", "lomo", "adamw_8bit", "paged_adamw_8bit", "lion_8bit"]


_OLDEST = (("device", "cpu"), ("long_texts", None), ("weigh_by", None))
"""Settings that older recipes lack, with the value of those recipes."""


def _accept_optimizer(value: Any) -> Any:
    """Accept the spelling ``optimizer``. If both spellings are given, keep both, so that validation refuses one."""
    if not isinstance(value, Mapping) or "optimizer" not in value or "optimiser" in value:
        return value
    return {"optimiser" if key == "optimizer" else key: entry for key, entry in value.items()}


class Train(SettingsModel):
    """Settings of the local training of one client in one round."""

    techniques: list[Unit] = Field([Unit(name="full")], min_length=1)
    optimiser: Optimiser = Field("adamw", description="lomo: sgd that updates weights during the backward pass")
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="schedule over all rounds of the run"
    )
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="share of all steps with rising learning rate")
    momentum: float = Field(0.0, ge=0, lt=1, description="momentum of sgd; reset to zero in every round")
    nesterov: bool = Field(False, description="use Nesterov momentum in sgd")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="gradients are clipped to this norm; default with sgd and lomo: none"
    )
    batch_size: int = Field(16, ge=1)
    max_length: int = Field(128, ge=2, description="number of tokens that texts are truncated to")
    group_by_length: bool = Field(False, description="batches of texts of similar length: less padding, less time")
    packing: Literal["none", "best-fit"] = Field(
        "none", description="best-fit: several short texts in a row of max_length tokens; text-generation only"
    )
    long_texts: Literal["cut", "split"] | None = Field(
        None, description="texts longer than max_length in packed rows: all pieces, or the first; default: split"
    )
    weigh_by: Literal["examples", "tokens"] | None = Field(
        None, description="what weighs a client with packed rows: its texts, or their targets; default: tokens"
    )
    image_size: int | None = Field(
        None, ge=8, description="side in pixels that images are resized to; default: the model's"
    )
    augmentation: Augmentation | None = Field(None, description="random changes to training images; default: none")
    local_steps: int | None = Field(None, ge=1)
    local_epochs: int | None = Field(None, ge=1)
    threads: int = Field(
        1, ge=1, description="CPU threads per client; results are reproducible only with the same number"
    )
    device: ComputeDevice = Field("cpu", description="where models compute; auto: cuda, else mps, else cpu")

    @model_serializer(mode="wrap")
    def _leave_out_oldest(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Recipes are written as before there was a choice of these settings, so that their runs resume."""
        written: dict[str, Any] = serialise(self)
        return {key: value for key, value in written.items() if (key, value) not in _OLDEST}

    @field_validator("techniques", mode="before")
    @classmethod
    def _split_joined_techniques(cls, value: Any) -> Any:
        return split_joined(value)

    @model_validator(mode="before")
    @classmethod
    def _plain_sgd_is_not_clipped(cls, value: Any) -> Any:
        value = _accept_optimizer(value)
        plain = (
            isinstance(value, Mapping) and value.get("optimiser") in ("sgd", "lomo") and "max_grad_norm" not in value
        )
        return {**value, "max_grad_norm": None} if plain else value

    @model_validator(mode="after")
    def _momentum_is_of_sgd(self) -> Self:
        if self.optimiser != "sgd" and (self.momentum or self.nesterov):
            raise ValueError(f"momentum and nesterov are settings of sgd, but optimiser is {self.optimiser}; drop them")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum, e.g. momentum: 0.9")
        return self

    @model_validator(mode="after")
    def _lomo_sees_one_gradient_at_a_time(self) -> Self:
        if self.optimiser == "lomo" and self.max_grad_norm is not None:
            raise ValueError("lomo updates weights before all gradients are known, so drop max_grad_norm, or take sgd")
        return self

    @model_validator(mode="after")
    def _packed_rows_are_not_grouped(self) -> Self:
        if self.group_by_length and self.packing != "none":
            raise ValueError("group_by_length has nothing to group where packing fills every row; drop one of them")
        return self

    @model_validator(mode="after")
    def _packing_has_settings_of_its_own(self) -> Self:
        told = [name for name in ("long_texts", "weigh_by") if getattr(self, name) is not None]
        if told and self.packing == "none":
            raise ValueError(f"{told[0]} is a setting of packed texts, but packing is none; drop one of them")
        return self

    def fill_in_packing(self) -> Self:
        """With the settings of packed texts, as new runs get them. A stored run without them cuts, and weighs texts."""
        if self.packing == "none":
            return self
        return self.model_copy(update={"long_texts": self.long_texts or "split", "weigh_by": self.weigh_by or "tokens"})

    @model_validator(mode="after")
    def _one_measure_of_work(self) -> Self:
        if (self.local_steps is None) == (self.local_epochs is None):
            raise ValueError("say either local_steps or local_epochs, exactly one of them")
        return self
