"""The settings of a stream: the tasks that arrive one after another, and what keeps the memory of earlier ones."""

from datetime import date
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ByteSize, Discriminator, Field, Tag, model_validator

from fedtune.recipe.settings_model import SettingsModel
from fedtune.recipe.train_settings import Unit

__all__ = ["Drift", "EachValue", "EqualGroups", "OwnMemory", "Staggered", "Stream", "StreamTask", "TimeCuts"]

_RESERVED = frozenset({"all", "mean"})
_COLUMN = {"class": "label", "task": "label", "domain": "domain"}
"""The column that tells tasks apart, by setting."""


def _read_value(value: Any) -> Any:
    """Return a number or a date as text, as the values of a column are compared."""
    if isinstance(value, bool):
        raise ValueError("YAML reads it as true or false; put it in quotes")
    if isinstance(value, date):
        return value.isoformat()
    return str(value) if isinstance(value, int | float) else value


_Value = Annotated[str, BeforeValidator(_read_value)]
"""A value of the stream's column."""


class StreamTask(SettingsModel):
    """A task of a stream for a number of rounds. A name that was used before stands for the same task again.

    Its examples have one of the values ``where`` in the stream's column, by default the task's name. In a stream over
    time they lie in ``since`` <= value < ``until``; numbers are compared as numbers, other values as text.
    """

    name: _Value = Field(min_length=1, max_length=255)
    rounds: int = Field(ge=1, le=100_000)
    where: list[_Value] | None = Field(None, min_length=1, max_length=10_000)
    since: _Value | None = None
    until: _Value | None = None

    @model_validator(mode="after")
    def _name_is_free(self) -> Self:
        if self.name in _RESERVED:
            raise ValueError(f"a task is called {self.name!r}, as summaries are; rename it")
        return self

    @property
    def repeats(self) -> bool:
        """Whether it says nothing about its examples."""
        return self.where is None and self.since is None and self.until is None


class EqualGroups(SettingsModel):
    """Every ``size`` labels are a task."""

    size: int = Field(ge=1)
    rounds: int = Field(ge=1, le=100_000, description="rounds of each task")
    order: Literal["listed", "seed"] = Field("listed", description="order of the labels: the data's, or drawn")


class EachValue(SettingsModel):
    """Every value of a column is a task."""

    each: str = Field(min_length=1)
    rounds: int = Field(ge=1, le=100_000, description="rounds of each task")
    order: Literal["listed", "seed"] = Field("listed", description="order of the values: sorted, or drawn")


class TimeCuts(SettingsModel):
    """Tasks between the values of a column at which one ends and the next begins."""

    cut: list[_Value] = Field(min_length=1, max_length=10_000)
    rounds: int = Field(ge=1, le=100_000, description="rounds of each task")


class Staggered(SettingsModel):
    """Client k begins ``staggered`` rounds later than client k - 1, in ``waves`` that repeat."""

    staggered: int = Field(ge=1, le=100_000, description="rounds between the waves")
    waves: int = Field(4, ge=2, le=100_000)


class OwnMemory(SettingsModel):
    """What a device may keep of earlier tasks on its own disk."""

    budget: ByteSize | None = Field(None, description="bytes on the disk of each device; default: no limit")
    encrypted: bool = Field(False, description="encrypt the files with a key that stays on the device")


class Drift(SettingsModel):
    """What tells that the data of a device no longer look like those of the tasks so far."""

    signal: Literal["centred", "plain", "nac", "scale"] = Field(
        "centred", description="centred: T2 of a batch, centred by class; plain: without labels; nac; scale"
    )
    batch: int = Field(32, ge=2, le=4096, description="examples of which a device computes its signal")
    patience: int = Field(2, ge=1, le=1000, description="rounds in a row above the threshold that raise the alarm")
    opens: bool = Field(False, description="whether an alarm ends the task and opens a new one")
    asks: bool = Field(False, description="whether clients above the threshold come first in the next round")


def _name_form(value: object) -> str:
    """Name how the tasks are given, so that errors concern this form alone."""
    if isinstance(value, EqualGroups | EachValue | TimeCuts):
        value = value.model_dump()
    return next((key for key in ("each", "cut", "size") if isinstance(value, dict) and key in value), "list")


Tasks = Annotated[
    Annotated[list[StreamTask], Tag("list")]
    | Annotated[EqualGroups, Tag("size")]
    | Annotated[EachValue, Tag("each")]
    | Annotated[TimeCuts, Tag("cut")],
    Discriminator(_name_form),
]
"""The tasks in order, or a rule that the data turn into a list."""


class Stream(SettingsModel):
    """A stream of tasks.

    ``setting`` says what changes between tasks. domain: the inputs; class: new labels come, and the model must tell all
    labels seen so far apart; task: the labels, and the task is known when a model is used; time: anything.
    """

    setting: Literal["domain", "class", "task", "time"]
    by: str | None = Field(None, description="column that tells tasks apart; default: label or domain")
    tasks: Tasks
    arrival: Literal["together", "own"] | Staggered = Field(
        "together", description="together; staggered: clients begin one after another; own: each in its own order"
    )
    blur: float = Field(0.0, ge=0, le=0.9, description="share of a task's examples that come with its neighbours")
    loss: Literal["seen", "new"] = Field(
        "seen", description="classes that the loss compares in a class stream: all so far, or those of the task"
    )
    memory: list[Unit] = Field([], max_length=8, description="what keeps the memory of earlier tasks; [] is naive")
    consolidate: list[Unit] = Field([], max_length=8, description="merge steps at the end of each task")
    own_memory: OwnMemory = OwnMemory()
    drift: Drift | None = Field(None, description="watch whether the data of devices change; default: no")

    @model_validator(mode="before")
    @classmethod
    def _name_column(cls, value: Any) -> Any:
        """Fill in the column of the setting."""
        if not isinstance(value, dict) or value.get("by") is not None:
            return value
        tasks = value.get("tasks")
        column = tasks.get("each") if isinstance(tasks, dict) else None
        return {**value, "by": column or _COLUMN.get(value.get("setting", ""))}

    @model_validator(mode="after")
    def _column_fits(self) -> Self:
        if self.by is None:
            raise ValueError("by: a stream over time needs the column that orders its examples, e.g. by: date")
        if self.setting in ("class", "task") and self.by != "label":
            raise ValueError(f"a {self.setting} stream goes by label; drop by, or choose setting: domain or time")
        if isinstance(self.tasks, EqualGroups) and self.by != "label":
            raise ValueError("tasks: size groups labels; write {each: COLUMN, rounds: N}, or list the tasks")
        if isinstance(self.tasks, TimeCuts) and self.setting != "time":
            raise ValueError("tasks: cut divides a stream with setting: time")
        if self.loss == "new" and self.setting != "class":
            raise ValueError("loss: new concerns the classes of a class stream; drop it")
        return self

    @model_validator(mode="after")
    def _tasks_differ(self) -> Self:
        if not isinstance(self.tasks, list):
            return self
        if not self.tasks:
            raise ValueError("tasks: a stream needs at least one task")
        owner: dict[str, str] = {}
        known: set[str] = set()
        for task in self.tasks:
            if task.name in known and not task.repeats:
                raise ValueError(f"tasks: {task.name} comes again, so its examples are known; drop where, since, until")
            for value in () if task.name in known or self.setting == "time" else task.where or [task.name]:
                if value in owner:
                    raise ValueError(
                        f"tasks: {value!r} belongs to {owner[value]} and to {task.name}; a value has one task"
                    )
                owner[value] = task.name
            known.add(task.name)
        return self

    @model_validator(mode="after")
    def _own_orders_are_equal(self) -> Self:
        if self.arrival == "own" and isinstance(self.tasks, list) and len({task.rounds for task in self.tasks}) > 1:
            raise ValueError("arrival: own needs equally many rounds for each task, so that all tasks end together")
        return self

    @property
    def longest_delay(self) -> int:
        """The rounds by which the last clients begin late."""
        return self.arrival.staggered * (self.arrival.waves - 1) if isinstance(self.arrival, Staggered) else 0

    @property
    def num_rounds(self) -> int | None:
        """The rounds of the whole stream; None while its tasks are not listed."""
        if not isinstance(self.tasks, list):
            return None
        return sum(task.rounds for task in self.tasks) + self.longest_delay
