"""The settings of a recipe for the data: source, splits and the partition over clients."""

from typing import Annotated, Literal, Self

from pydantic import Field, WrapSerializer, WrapValidator, field_validator, model_validator

from fedtune.recipe.plug_in_partition import serialise_partition, validate_partition
from fedtune.recipe.settings_model import SettingsModel

__all__ = [
    "ColumnSettings",
    "DataSettings",
    "Dirichlet",
    "EqualDirichlet",
    "Iid",
    "Natural",
    "PartitionSettings",
    "Shards",
    "Size",
    "SplitFractions",
]


class ColumnSettings(SettingsModel):
    """The names of the source's columns."""

    text: str = "text"
    image: str = "image"
    audio: str = Field("audio", description="path of a wav file, or its content")
    text_pair: str = Field("text_pair", description="second text of a pair")
    label: str = Field("label", description="a class, several classes or a number, depending on the task")
    target: str = Field("target", description="text to generate")
    prompt: str = Field("prompt", description="text or messages to reply to")
    chosen: str = Field("chosen", description="preferred completion")
    rejected: str = Field("rejected", description="completion that is not preferred")
    words: str = Field("words", description="list of words")
    tags: str = Field("tags", description="list with one tag per word")
    messages: str = Field("messages", description="conversation: list of role and content")
    completion: str = Field("completion", description="text or messages that reply to the prompt")
    instruction: str = Field("instruction", description="instruction that output replies to")
    input: str = Field("input", description="what the instruction is about")
    output: str = Field("output", description="reply to the instruction")
    conversations: str = Field("conversations", description="conversation in ShareGPT's form: list of from and value")
    tools: str = Field("tools", description="descriptions of the tools that a conversation may call")
    group: str | None = Field(None, description="examples of the same group are kept together")
    domain: str | None = Field(None, description="results are also reported per domain")
    split: str | Literal[False] | None = Field(
        None, description="split of each row: train, validation or test; default: a column called split; false: none"
    )


class SplitFractions(SettingsModel):
    """Shares of the groups in the validation and test splits, drawn by a stable hash if the source has no such
    splits.
    """

    validation: float = Field(0.1, gt=0, lt=1)
    test: float = Field(0.2, gt=0, lt=1)

    @model_validator(mode="after")
    def _leave_some_to_train(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together must leave something to train on: less than 1")
        return self


class Iid(SettingsModel):
    """Groups are dealt evenly at random."""

    kind: Literal["iid"] = "iid"


class Dirichlet(SettingsModel):
    """Each class is divided among the clients in proportions from Dirichlet(alpha), so labels and sizes differ.

    As in Flower, NIID-Bench (arXiv 2102.02079) and PFLlib. The draw is repeated until each client has ``min_examples``.
    """

    kind: Literal["dirichlet"] = "dirichlet"
    alpha: float = Field(0.5, gt=0)
    min_examples: int = Field(1, ge=1)
    balance: bool = Field(
        True, description="clients that hold an even share of all examples get none of the next class"
    )


class EqualDirichlet(SettingsModel):
    """Each client draws its own label proportions from Dirichlet(alpha). All clients get equally many examples."""

    kind: Literal["equal-dirichlet"] = "equal-dirichlet"
    alpha: float = Field(0.5, gt=0)
    min_examples: int = Field(1, ge=1)


class Natural(SettingsModel):
    """Clients follow a column: rows of one author, shop or domain stay together if there are no more clients than
    values.
    """

    kind: Literal["natural"] = "natural"
    column: str


class Size(SettingsModel):
    """All clients have the same label mix. Their sizes are proportional to ``rank ** -exponent``."""

    kind: Literal["power-law"] = "power-law"
    exponent: float = Field(1.0, ge=0)


class Shards(SettingsModel):
    """Groups are sorted by label and divided into shards; each client gets a few. This is an extreme label skew."""

    kind: Literal["shards"] = "shards"
    shards_per_client: int = Field(2, ge=1)


PartitionSettings = Annotated[Iid | Dirichlet | EqualDirichlet | Natural | Size | Shards, Field(discriminator="kind")]
AnyPartition = Annotated[
    PartitionSettings, WrapValidator(validate_partition), WrapSerializer(serialise_partition, when_used="always")
]
"""A partition of fedtune's, or one that another package publishes."""


class DataSettings(SettingsModel):
    """The source of the examples, their splits and their partition over clients."""

    source: str = Field(
        description="hub:ID, csv:FILE, jsonl:FILE, parquet:FILE, text:FILE, folder:PATH, disk:FOLDER or sample:NAME"
    )
    columns: ColumnSettings = ColumnSettings()
    splits: SplitFractions = SplitFractions()
    partition: AnyPartition = Iid()
    max_train_examples: int | None = Field(None, ge=1, description="limit of training examples, sampled with the seed")
    delimiter: str | None = Field(
        None, min_length=1, max_length=1, description="delimiter of csv files; default: detected from the header"
    )
    tokens: Literal["memory", "disk"] = Field(
        "memory", description="disk: tokenise texts once into the cache and read them there; text-generation only"
    )
    encoding: str | None = Field(None, description="encoding of csv and text files, e.g. cp1252; default: detected")
    skip_unreadable: bool = Field(
        False, description="leave out images and recordings that cannot be read, and report their number"
    )

    @field_validator("encoding")
    @classmethod
    def _of_text(cls, value: str | None) -> str | None:
        try:
            "".encode(value or "utf-8")
        except (LookupError, UnicodeError) as error:
            raise ValueError(f"{value!r} is not a text encoding; write e.g. cp1252") from error
        return value
