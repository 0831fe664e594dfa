"""The recipe of a run: one frozen pydantic model, which is stored with the run."""

from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from fedtune.recipe.checkpoint_settings import Checkpoints, Keep
from fedtune.recipe.data_settings import (
    ColumnSettings,
    DataSettings,
    Dirichlet,
    EqualDirichlet,
    Iid,
    Natural,
    PartitionSettings,
    Shards,
    Size,
    SplitFractions,
)
from fedtune.recipe.device_class import OVERRIDABLE, DeviceClass, Dtype
from fedtune.recipe.evaluation_settings import EvaluationSettings
from fedtune.recipe.federation import Asynchronous, ClientSelection, Federation, Tag
from fedtune.recipe.memory_plans import MemoryPlans
from fedtune.recipe.preprocessor_settings import Preprocessor
from fedtune.recipe.round_schedule import change_settings, check_schedule
from fedtune.recipe.settings_model import SettingsModel
from fedtune.recipe.stream_rounds import fill_in_rounds
from fedtune.recipe.stream_settings import Stream
from fedtune.recipe.task_settings import TaskUnit
from fedtune.recipe.train_settings import ComputeDevice, Optimiser, Train, Unit, split_joined
from fedtune.recipe.versions import needs_translation, translate_recipe
from fedtune.recipe.wire_settings import WireSettings

__all__ = [
    "Asynchronous",
    "Checkpoints",
    "ClientSelection",
    "ColumnSettings",
    "ComputeDevice",
    "DataSettings",
    "DeviceClass",
    "Dirichlet",
    "EqualDirichlet",
    "EvaluationSettings",
    "Federation",
    "Iid",
    "Keep",
    "ModelSettings",
    "Natural",
    "Optimiser",
    "PartitionSettings",
    "Preprocessor",
    "PrivacySettings",
    "Recipe",
    "SettingsModel",
    "Shards",
    "Size",
    "SplitFractions",
    "Stream",
    "Tag",
    "TaskUnit",
    "Train",
    "Unit",
    "WireSettings",
    "split_joined",
]


_LEFT_OUT = (("stream", None), ("plans", None), ("wire", None))


class ModelSettings(SettingsModel):
    """The pretrained model. All updates are deltas to it."""

    source: str = Field(description="hub:ID, path:FOLDER, gguf:FILE, sample:NAME or run:ID[@ROUND]")
    dtype: Dtype = "float32"
    position_interpolation: float = Field(
        1.0, ge=1, description="factor by which texts may exceed the pretraining length; rotary models only"
    )
    preprocessor: Preprocessor | None = Field(
        None, description="image preprocessing; default: that of the model's folder"
    )
    paged: bool | Literal["bf16", "fp32", "int8", "nf4"] = Field(
        False,
        description="frozen matrices stay in a file and are read while they multiply; true: numbers as in the source",
    )

    @model_serializer(mode="wrap")
    def _leave_out_memory(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Recipes of models in memory are written as before there were paged ones, so that their runs resume."""
        written: dict[str, Any] = serialise(self)
        return {key: value for key, value in written.items() if (key, value) != ("paged", False)}


class PrivacySettings(SettingsModel):
    """Differential privacy of clients: updates of bounded norm and equal weight, and Gaussian noise."""

    clipping_norm: float = Field(gt=0, description="L2 norm to which each client's whole update is clipped")
    noise_multiplier: float = Field(
        gt=0, description="noise standard deviation / clipping_norm, for the sum, or for each update if clients add it"
    )
    noise_added_by: Literal["server", "clients"] = Field("server", description="who adds the noise and must be trusted")
    target_delta: float = Field(1e-5, gt=0, lt=1, description="delta at which epsilon is reported")


class Recipe(SettingsModel):
    """All settings of a run, except where it is executed.

    Keys and values of version 1 are translated, see ``fedtune.recipe.versions``.
    """

    version: Literal[2] = 2
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    task: TaskUnit
    model: ModelSettings
    data: DataSettings
    devices: list[DeviceClass] = Field(min_length=1)
    train: Train
    federation: Federation
    merge: list[Unit] = Field([Unit(name="mean")], min_length=1)
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoints: Checkpoints = Checkpoints()
    privacy: PrivacySettings | None = None
    stream: Stream | None = Field(None, description="tasks that arrive one after another; default: one task")
    wire: WireSettings | None = Field(None, description="codecs of messages; default: single precision")
    plans: MemoryPlans | None = Field(None, description="written by the planner for techniques: auto")
    seed: int = Field(0, ge=0)

    @model_serializer(mode="wrap")
    def _leave_out_what_is_unset(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Recipes without a stream, codecs or plans are written as before there were any, so that their runs resume."""
        written: dict[str, Any] = serialise(self)
        return {key: value for key, value in written.items() if (key, value) not in _LEFT_OUT}

    @model_validator(mode="before")
    @classmethod
    def _count_rounds_of_stream(cls, value: Any) -> Any:
        return value if not isinstance(value, dict) or not value.get("stream") else fill_in_rounds(value)

    @model_validator(mode="before")
    @classmethod
    def _translate_version_1(cls, value: Any) -> Any:
        return translate_recipe(value) if needs_translation(value) else value

    @property
    def num_clients(self) -> int:
        """The number of clients in the federation."""
        return sum(device.count for device in self.devices)

    @property
    def cohort_size(self) -> int:
        """The number of clients sampled in each round."""
        return self.federation.clients_per_round or max(1, round(self.num_clients * self.federation.fraction_train))

    def get_device_class(self, client: int) -> DeviceClass:
        """Return the device class of client 0, 1, ..., in the order of the recipe."""
        for device in self.devices:
            if client < device.count:
                return device
            client -= device.count
        raise IndexError("more clients than devices")

    def get_client_recipe(self, client: int) -> Self:
        """Return the recipe of one client: settings of its device class replace the recipe's."""
        return self.apply_device_class(self.get_device_class(client))

    def get_round_recipe(self, round_number: int) -> Self:
        """Return the recipe of a round: settings of ``federation.schedule`` replace the recipe's."""
        return change_settings(self, round_number)

    def apply_device_class(self, device: DeviceClass) -> Self:
        """Return the recipe of one device class. In the result, no class overrides settings."""
        none = dict.fromkeys(OVERRIDABLE)
        train = {
            "techniques": device.techniques or self.train.techniques,
            "batch_size": device.batch_size or self.train.batch_size,
            "device": device.device or self.train.device,
        }
        return self.model_copy(
            update={
                "devices": [each.model_copy(update=none) for each in self.devices],
                "train": self.train.model_copy(update=train),
                "model": self.model.model_copy(update={"dtype": device.dtype or self.model.dtype}),
            }
        )

    @model_validator(mode="after")
    def _rounds_are_those_of_stream(self) -> Self:
        planned = None if self.stream is None else self.stream.num_rounds
        if planned is not None and planned != self.federation.rounds:
            raise ValueError(
                f"federation.rounds is {self.federation.rounds}, but the tasks of the stream take {planned}; drop it"
            )
        return self

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        check_schedule(self)
        return self

    @model_validator(mode="after")
    def _device_classes_differ_by_name(self) -> Self:
        names = [device.name for device in self.devices]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice and any(device.overridden_settings or device.attack for device in self.devices):
            raise ValueError(
                f"devices: two classes are called {twice[0]}; name them apart to give one its own settings"
            )
        return self

    @model_validator(mode="after")
    def _dropout_ends(self) -> Self:
        dropping = [device.name for device in self.devices if device.dropout]
        if dropping and self.federation.deadline is None:
            raise ValueError(
                f"devices: {dropping[0]} has a dropout, and without federation.deadline a round would wait for ever"
            )
        return self

    @model_validator(mode="after")
    def _enough_clients(self) -> Self:
        if self.cohort_size > self.num_clients:
            raise ValueError(
                f"federation.clients_per_round is {self.cohort_size}, but devices has only {self.num_clients}"
            )
        if self.federation.quorum > self.cohort_size:
            raise ValueError(f"federation.quorum is above the {self.cohort_size} clients sampled each round")
        scorers = self.evaluation.clients
        if isinstance(scorers, int) and scorers > self.num_clients:
            raise ValueError(f"evaluation.clients is {scorers}, but devices has only {self.num_clients}")
        if self.federation.take_first is not None and self.federation.take_first > self.cohort_size:
            raise ValueError(
                f"federation.take_first is {self.federation.take_first}, above the {self.cohort_size} clients "
                "sampled each round"
            )
        if self.federation.asynchronous is not None and self.federation.asynchronous.buffer_size > self.num_clients:
            raise ValueError(
                f"federation.asynchronous.buffer_size is {self.federation.asynchronous.buffer_size}, above the "
                f"{self.num_clients} clients"
            )
        return self
