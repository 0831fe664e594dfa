"""The part of a recipe that says where examples come from, which are held out, and how clients share the rest."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

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
    """Which column of the source holds what."""

    text: str = "text"
    image: str = "image"
    text_pair: str = Field("text_pair", description="the second text of a pair")
    label: str = Field("label", description="a class, several classes or a number, as the task takes it")
    target: str = Field("target", description="the text to write")
    words: str = Field("words", description="a list of words")
    tags: str = Field("tags", description="a list with a tag for each word")
    group: str | None = Field(None, description="examples that share it are never split apart")
    domain: str | None = Field(None, description="results are also reported per value of it")
    split: str | Literal[False] | None = Field(
        None, description="says train, validation or test of each row; by default one called split; false: nothing does"
    )


class SplitFractions(SettingsModel):
    """Shares of the groups held out by a stable hash, where the source has no parts of its own."""

    validation: float = Field(0.1, gt=0, lt=1)
    test: float = Field(0.2, gt=0, lt=1)

    @model_validator(mode="after")
    def _leave_some_to_train(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together must leave something to train on: less than 1")
        return self


class Iid(SettingsModel):
    """Groups dealt out evenly at random."""

    kind: Literal["iid"] = "iid"


class Dirichlet(SettingsModel):
    """Each class is shared out over the clients in proportions drawn from Dirichlet(alpha): labels and sizes differ.

    As Flower, NIID-Bench (arXiv 2102.02079) and PFLlib draw it; drawn again until no client falls short.
    """

    kind: Literal["dirichlet"] = "dirichlet"
    alpha: float = Field(0.5, gt=0)
    min_examples: int = Field(1, ge=1)
    balance: bool = Field(True, description="who has an even share of all examples gets none of the next class")


class EqualDirichlet(SettingsModel):
    """Each client draws label proportions of its own from Dirichlet(alpha), and all get equally many examples."""

    kind: Literal["equal-dirichlet"] = "equal-dirichlet"
    alpha: float = Field(0.5, gt=0)
    min_examples: int = Field(1, ge=1)


class Natural(SettingsModel):
    """Clients follow a column: one author, shop or domain stays together as far as the number of clients allows."""

    kind: Literal["natural"] = "natural"
    column: str


class Size(SettingsModel):
    """Same label mix, sizes proportional to ``rank ** -exponent``."""

    kind: Literal["power-law"] = "power-law"
    exponent: float = Field(1.0, ge=0)


class Shards(SettingsModel):
    """Groups sorted by label and cut into shards; each client gets a few: the pathological split."""

    kind: Literal["shards"] = "shards"
    shards_per_client: int = Field(2, ge=1)


PartitionSettings = Annotated[Iid | Dirichlet | EqualDirichlet | Natural | Size | Shards, Field(discriminator="kind")]


class DataSettings(SettingsModel):
    """Where the examples come from and how they are split over clients."""

    source: str = Field(
        description="hub:ID, csv:FILE, jsonl:FILE, parquet:FILE, text:FILE, folder:PATH, disk:FOLDER or sample:NAME"
    )
    columns: ColumnSettings = ColumnSettings()
    splits: SplitFractions = SplitFractions()
    partition: PartitionSettings = Iid()
    max_train_examples: int | None = Field(
        None, ge=1, description="keep at most so many training examples, chosen by seed"
    )
    tokens: Literal["memory", "disk"] = Field(
        "memory", description="disk: texts are tokenised once into the cache and read from there; text-generation only"
    )
    delimiter: str | None = Field(None, min_length=1, max_length=1, description="of csv; by default the heading's")
    encoding: str | None = Field(None, description="of csv and text, e.g. cp1252; by default as its bytes look")
    skip_unreadable: bool = Field(False, description="leave out pictures that cannot be read, and say how many")

    @field_validator("encoding")
    @classmethod
    def _of_text(cls, value: str | None) -> str | None:
        try:
            "".encode(value or "utf-8")
        except (LookupError, UnicodeError) as error:
            raise ValueError(f"{value!r} is no encoding of text; write e.g. cp1252") from error
        return value
