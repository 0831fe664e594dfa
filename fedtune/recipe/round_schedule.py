"""Settings of a recipe that change from a round on, and when a run ends early."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pydantic import Field, model_validator

from fedtune.recipe.settings_model import SettingsModel

if TYPE_CHECKING:
    from fedtune.recipe.schema import Recipe

__all__ = ["EarlyStopping", "ScheduledSettings", "change_settings", "check_schedule", "list_cohort_sizes"]

RecipeType = TypeVar("RecipeType", bound="Recipe")
_TRAIN = ("lr", "local_steps", "local_epochs")


class ScheduledSettings(SettingsModel):
    """Settings that replace those of ``train`` and ``federation`` from a round on, until a later entry replaces them.

    ``train.lr_schedule`` still covers the whole run: its factor multiplies the new ``lr``.
    """

    from_round: int = Field(ge=2, description="first round with these settings")
    lr: float | None = Field(None, gt=0, allow_inf_nan=False, description="replaces train.lr")
    local_steps: int | None = Field(None, ge=1, description="replaces train.local_steps")
    local_epochs: int | None = Field(None, ge=1, description="replaces train.local_epochs")
    clients_per_round: int | None = Field(None, ge=1, description="replaces federation.clients_per_round")

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if all(getattr(self, name) is None for name in (*_TRAIN, "clients_per_round")):
            raise ValueError(f"the entry from round {self.from_round} changes nothing; set lr, local_steps or another")
        return self


class EarlyStopping(SettingsModel):
    """A run ends before its last round when the main metric reached a target, or has not improved for a while.

    The metric is that of the validation split, or of clients' held-out data if the server scores none.
    """

    patience: int | None = Field(None, ge=1, description="rounds without an improvement after which the run ends")
    min_improvement: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="smaller changes of the metric are no improvement"
    )
    target: float | None = Field(None, allow_inf_nan=False, description="value of the metric that ends the run")

    @model_validator(mode="after")
    def _ends_at_something(self) -> Self:
        if self.patience is None and self.target is None:
            raise ValueError("early_stopping ends no run yet; set patience, e.g. 5, or a target")
        if self.min_improvement and self.patience is None:
            raise ValueError("min_improvement says what patience counts as an improvement; set patience, or drop it")
        return self


def change_settings(recipe: RecipeType, round_number: int) -> RecipeType:
    """Return the recipe with the settings of a round; the recipe itself if nothing has changed yet."""
    changes: dict[str, Any] = {}
    for entry in recipe.federation.schedule or []:
        if entry.from_round <= round_number:
            changes |= entry.model_dump(exclude={"from_round"}, exclude_none=True)
    if not changes:
        return recipe
    train = {name: changes[name] for name in _TRAIN if name in changes}
    federation = {name: value for name, value in changes.items() if name not in _TRAIN}
    return recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update=train),
            "federation": recipe.federation.model_copy(update=federation),
        }
    )


def list_cohort_sizes(recipe: "Recipe") -> list[int]:
    """Return the numbers of clients that rounds select, first that at the start."""
    entries = recipe.federation.schedule or []
    return [recipe.cohort_size, *(one.clients_per_round for one in entries if one.clients_per_round is not None)]


def check_schedule(recipe: "Recipe") -> None:
    """Raise ValueError for entries that contradict each other or the rest of the recipe."""
    federation, entries = recipe.federation, recipe.federation.schedule or []
    if federation.early_stopping is not None and recipe.stream is not None:
        raise ValueError("federation.early_stopping: the tasks of a stream decide its rounds; drop one of them")
    for before, after in pairwise(entries):
        if after.from_round <= before.from_round:
            raise ValueError(
                f"federation.schedule: round {after.from_round} comes after round {before.from_round}; list the "
                "entries by from_round, each round once"
            )
    if entries and entries[-1].from_round > federation.rounds:
        raise ValueError(
            f"federation.schedule changes settings from round {entries[-1].from_round}, but the run has "
            f"{federation.rounds} rounds; drop the entry, or add rounds"
        )
    _check_work(recipe, entries)
    if any(one.clients_per_round is not None for one in entries):
        _check_cohorts(recipe)


def _check_work(recipe: "Recipe", entries: Sequence[ScheduledSettings]) -> None:
    for name, other in (("local_steps", "local_epochs"), ("local_epochs", "local_steps")):
        if getattr(recipe.train, name) is None and any(getattr(one, name) is not None for one in entries):
            raise ValueError(f"federation.schedule changes {name}, but train has {other}; change {other} instead")


def _check_cohorts(recipe: "Recipe") -> None:
    federation, sizes = recipe.federation, list_cohort_sizes(recipe)
    if federation.asynchronous is not None:
        raise ValueError(
            "federation.schedule changes clients_per_round, but asynchronous.buffer_size replies end a round; drop one"
        )
    if recipe.privacy is not None:
        raise ValueError(
            "federation.schedule changes clients_per_round, but the privacy accounting takes one number for all "
            "rounds; drop it from the schedule"
        )
    if max(sizes) > recipe.num_clients:
        raise ValueError(
            f"federation.schedule: clients_per_round is {max(sizes)}, but devices has only {recipe.num_clients}"
        )
    least = max(federation.quorum, federation.take_first or 1)
    if min(sizes) < least:
        raise ValueError(
            f"federation.schedule: clients_per_round is {min(sizes)}, below the {least} updates that quorum or "
            "take_first asks for; raise it"
        )
