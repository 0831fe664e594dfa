"""The settings of a recipe for the data: source, splits and the partition over clients."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    WrapSerializer,
    WrapValidator,
    field_validator,
    model_serializer,
    model_validator,
)

from fedtune.recipe.column_settings import ColumnSettings
from fedtune.recipe.expressions import Expression
from fedtune.recipe.joined_source import JoinedSource, check_encoding, check_joined_sources, read_short_form
from fedtune.recipe.plug_in_partition import serialise_partition, validate_partition
from fedtune.recipe.settings_model import SettingsModel

__all__ = [
    "ColumnSettings",
    "DataSettings",
    "Dirichlet",
    "EqualDirichlet",
    "Iid",
    "JoinedSource",
    "Natural",
    "PartitionSettings",
    "Shards",
    "Size",
    "SplitFractions",
]


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


_SOURCES = "hub:ID, csv:FILE, jsonl:FILE, parquet:FILE, text:FILE, folder:PATH, disk:FOLDER or sample:NAME"
_OPTIONAL = ("source", "train", "validation", "test", "sources", "filter", "map")
"""Settings that are written only where they are set: older recipes are stored without them."""


class DataSettings(SettingsModel):
    """The source of the examples, their splits and their partition over clients.

    The examples come from ``source``, from one source per split, or from several joined ``sources``.
    """

    source: str | None = Field(None, description=_SOURCES)
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
    skip_unreadable: bool = Field(False, description="leave out images that cannot be read, and report their number")
    train: str | None = Field(None, description="source of the training examples, instead of source")
    validation: str | None = Field(None, description="source of the validation split; default: drawn from train")
    test: str | None = Field(None, description="source of the test split; default: drawn from train")
    sources: Annotated[list[JoinedSource], BeforeValidator(read_short_form)] | None = Field(
        None, min_length=1, max_length=100, description="sources that are joined, instead of source"
    )
    filter: Expression | None = Field(None, description="keeps the rows for which it is true, in all splits")
    map: dict[str, Expression] | None = Field(
        None, min_length=1, max_length=64, description="new columns, made before the filter and the split column"
    )

    @field_validator("encoding")
    @classmethod
    def _of_text(cls, value: str | None) -> str | None:
        return check_encoding(value)

    @model_validator(mode="after")
    def _one_kind_of_source(self) -> Self:
        given = [name for name in ("source", "train", "sources") if getattr(self, name) is not None]
        own = [name for name in ("validation", "test") if getattr(self, name) is not None]
        if not given and not own:
            raise ValueError("the key 'source' is missing; name a source, train (validation, test), or sources")
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} both name the data; keep one of them")
        if own and given != ["train"]:
            mend = {"source": "write train instead of source", "sources": "its sources bring their own splits"}
            raise ValueError(f"{own[0]} stands beside train only; {mend.get(''.join(given), 'add train')}")
        check_joined_sources(self.sources or [])
        return self

    @model_validator(mode="after")
    def _mapped_columns_are_used(self) -> Self:
        for name in self.map or {}:
            if (column := getattr(self.columns, name, name)) != name and isinstance(column, str):
                raise ValueError(
                    f"map makes a column {name!r}, but columns.{name} names {column!r}; remove one of them"
                )
        return self

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = handler(self)
        return {key: value for key, value in written.items() if key not in _OPTIONAL or value is not None}

    @property
    def title(self) -> str:
        """The sources as messages and tables name them."""
        if self.sources is not None:
            return _join_words([one.source for one in self.sources])
        if self.train is not None:
            return _join_words([one for one in (self.train, self.validation, self.test) if one is not None])
        return f"{self.source} (filtered)" if self.filter is not None else str(self.source)


def _join_words(words: list[str]) -> str:
    if len(words) > 3:
        words = [*words[:2], f"{len(words) - 2} more"]
    return " and ".join([*([", ".join(words[:-1])] if words[1:] else []), words[-1]])
