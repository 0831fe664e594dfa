"""The configuration of a merge: mergekit's schema, and the steps that mergekit does not have."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from fedtune.offline_merge.layered_parameters import LayeredValue
from fedtune.recipe.schema import SettingsModel, Unit

__all__ = ["MergeConfig", "ModelEntry", "OutputSlice", "SliceSource", "TokenRule", "TokenSource", "TokenizerRule"]

Precision = Literal["float32", "float16", "bfloat16"]


def reference(value: Any) -> Any:
    """Return a model as one text if it is written as in mergekit: {model: {path, revision}, lora: ...}.

    Other values are returned unchanged, and their type check refuses them.
    """
    if not isinstance(value, dict):
        return value
    if value.keys() <= {"path", "revision"} and "path" in value:
        return value["path"] if value.get("revision") is None else f"{value['path']}@{value['revision']}"
    if "model" in value and not {key for key in value if key not in ("model", "lora") and value[key] is not None}:
        base, lora = reference(value["model"]), reference(value.get("lora"))
        return base if lora is None else f"{base}+{lora}"
    return value


def _nothing(value: Any) -> Any:
    return {} if value is None else value


Reference = Annotated[str, BeforeValidator(reference)]
Parameters = Annotated[dict[str, LayeredValue], BeforeValidator(_nothing)]


class ModelEntry(SettingsModel):
    """One model and its own parameters. ``statistics`` is a safetensors file that some methods need."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: Reference
    parameters: Parameters = Field({})
    statistics: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        return {"model": value} if isinstance(reference(value), str) else value


class SliceSource(ModelEntry):
    """Some layers of one model. ``layer_range`` has the first layer and the one after the last, counted from 0."""

    layer_range: tuple[int, int]

    @field_validator("layer_range")
    @classmethod
    def _ascending(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= value[0] <= value[1]:
            raise ValueError("write it as [first, end] with 0 <= first <= end")
        return value


class OutputSlice(SettingsModel):
    """Layers of the result, merged from the same number of layers of each source."""

    sources: list[SliceSource] = Field(min_length=1)
    parameters: Parameters = Field({})

    @model_validator(mode="after")
    def _of_one_length(self) -> Self:
        if len({source.layer_range[1] - source.layer_range[0] for source in self.sources}) > 1:
            raise ValueError("the sources of a slice must have the same number of layers")
        return self


class TokenSource(SettingsModel):
    """The source of a token's rows: zeros, or another token of a model."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    kind: Literal["zero", "model_token"]
    model: Annotated[str | None, BeforeValidator(reference)] = None
    token: str | None = None
    token_id: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.kind == "model_token" and (self.model is None or (self.token is None) == (self.token_id is None)):
            raise ValueError("model_token needs model, and either token or token_id")
        return self


class TokenRule(SettingsModel):
    """The rows of one token in the models that lack it, or with ``force`` in all of them."""

    source: Annotated[str | TokenSource | None, BeforeValidator(reference)] = None
    force: bool = False


class TokenizerRule(SettingsModel):
    """The vocabulary of the result: ``union``, ``base`` or that of a model."""

    source: Reference = "union"
    tokens: Annotated[dict[str, TokenRule], BeforeValidator(_nothing)] = Field({})
    pad_to_multiple_of: int | None = Field(None, ge=1)


class MergeConfig(SettingsModel):
    """A merge of models, or of slices of them. Other documents in the file refer to the result by ``name``."""

    name: str | None = Field(None, pattern=r"^[\w.-]+$")
    merge_method: str = "linear"
    models: list[ModelEntry] | None = Field(None, min_length=1)
    slices: list[OutputSlice] | None = Field(None, min_length=1)
    base_model: Annotated[str | None, BeforeValidator(reference)] = None
    parameters: Parameters = Field({})
    dtype: Precision | None = None
    out_dtype: Precision | None = None
    tokenizer_source: Annotated[str | None, BeforeValidator(reference)] = None
    tokenizer: TokenizerRule | None = None
    chat_template: str | None = None
    align: list[Unit] = Field([])
    relax: list[Unit] = Field([])
    renormalise: list[Unit] = Field([], validation_alias=AliasChoices("renormalise", "renormalize"))
    seed: int = Field(0, ge=0)

    @field_validator("align", "relax", "renormalise", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | dict) else value

    @model_validator(mode="before")
    @classmethod
    def _one_module(cls, value: Any) -> Any:
        """Accept mergekit's ``modules`` if there is only one."""
        if not isinstance(value, dict) or not isinstance(value.get("modules"), dict):
            return value
        parts = list(value["modules"].values())
        if len(parts) != 1 or not isinstance(parts[0], dict) or parts[0].keys() & value.keys():
            raise ValueError("modules: only one module is merged at a time; say what it has as models or slices")
        return {**{key: found for key, found in value.items() if key != "modules"}, **parts[0]}

    @model_validator(mode="after")
    def _models_or_slices(self) -> Self:
        if (self.models is None) == (self.slices is None):
            raise ValueError("say either models or slices, exactly one of them")
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise ValueError("say either tokenizer or tokenizer_source, not both")
        if self.relax and self.base_model is None:
            raise ValueError("relax holds a merge near its base; name it with base_model")
        return self

    @property
    def tokenizer_rule(self) -> TokenizerRule | None:
        """The rule for the result's tokenizer, if there is one."""
        return TokenizerRule(source=self.tokenizer_source) if self.tokenizer_source is not None else self.tokenizer

    @property
    def model_entries(self) -> Sequence[ModelEntry]:
        """All entries of models, in order."""
        if self.models is not None:
            return self.models
        return [source for part in self.slices or [] for source in part.sources]

    @property
    def model_names(self) -> list[str]:
        """The names of the models, each once. A base that is only named as the base is left out."""
        return list(dict.fromkeys(entry.model for entry in self.model_entries))
